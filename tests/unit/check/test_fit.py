"""``check --fit`` and the guess of the speed: choices fit by the same estimate, numbers are those of the records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salient_ds.check.fit import CONTEXT, Choice, bytes_of, fit_facts, fit_text, fitting, limit
from salient_ds.check.memory import GIB
from salient_ds.check.pace import RECORDS, pace, pace_text
from salient_ds.check.preflight import preflight
from salient_ds.check.printing import run_check
from salient_ds.check.report import Report
from salient_ds.config.run import RunConfig, load_config
from salient_ds.zero.ds_json import summary

ROOT = Path(__file__).resolve().parents[3]
SHAPE = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008,
    "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
}  # fmt: skip
Make = Callable[..., tuple[RunConfig, Report]]


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_alpaca: Path) -> Make:
    """The run of a LLaMA-7B without weights, and the report of its check."""
    folder = tmp_path_factory.mktemp("fit")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    content = {
        "output_dir": str(folder / "run"), "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "model": {"path": str(folder), "random_weights": True, "tokenizer": str(tiny_llama)}, "adapter": {"rank": 64},
        "method": {"name": "salientlora", "target_rank": 16}, "data": {"train": str(tiny_alpaca), "max_length": 512},
        "train": {"max_steps": 1000, "global_batch_size": 64, "micro_batch_size": 4, "lr": 1e-4},
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(content))

    def make(*overrides: str, gpus: int = 1) -> tuple[RunConfig, Report]:
        run = load_config(folder / "run.yaml", list(overrides))
        return run, preflight(run, gpus, quick=True)

    return make


def choose(made: tuple[RunConfig, Report], memory: int) -> Choice | None:
    run, report = made
    assert report.memory_inputs is not None
    return fitting(run, report.memory_inputs, summary(report.facts["ds_config"]), report.facts["processes"], memory)


@pytest.mark.parametrize(
    ("gpus", "memory", "expected"),
    [
        # zero, micro-batch, checkpointing, share of activations. 7B parameters in bf16 are 12.6 GiB.
        (1, 80, ("zero2", 16, "none", 1.0)),
        (8, 80, ("zero2", 8, "none", 1.0)),
        (1, 24, ("zero2", 4, "none", 0.5)),
        (8, 16, ("zero3", 4, "none", 1.0)),
        (1, 3, None),
    ],
)
def test_what_is_chosen(llama_7b: Make, gpus: int, memory: int, expected: tuple[Any, ...] | None) -> None:
    found = choose(llama_7b(gpus=gpus), memory * GIB)
    assert (None if found is None else (found.zero, *found.settings().values())) == expected


@pytest.mark.parametrize("memory", [6, 10, 14, 16, 20, 24, 32, 40, 80])
def test_a_choice_fits_by_the_estimate_of_check(llama_7b: Make, memory: int) -> None:
    for gpus in (1, 4):
        found = choose(llama_7b(gpus=gpus), memory * GIB)
        if found is None:
            continue
        overrides = [f"{key}={value}" for key, value in found.settings().items()]
        overrides.append(f"deepspeed={ROOT / 'ds_configs' / f'{found.zero}.json'}")
        run, report = llama_7b(*overrides, gpus=gpus)
        assert report.problems == []
        zero = summary(report.facts["ds_config"])
        assert (zero.stage, zero.offload_optimizer) == (found.stage, found.offload)
        # "auto" buckets of ds_configs/zero3.json are smaller than those of the run's own file, which fit counts with
        assert report.facts["this_run"]["peak"] + CONTEXT <= found.peak
        assert report.facts["this_run"]["peak"] <= limit(memory * GIB)
        assert run.train.global_batch_size % (run.train.micro_batch_size * gpus) == 0


def test_more_memory_never_recomputes_more(llama_7b: Make) -> None:
    made = llama_7b(gpus=2)
    found = [choose(made, memory * GIB) for memory in range(8, 81, 4)]
    order = [(c.offload, c.stage) for c in found if c is not None]
    assert order == sorted(order, reverse=True), "the stage gets simpler"
    assert found[-1] is not None and found[-1].activation_checkpointing == "none"


@pytest.mark.parametrize(("text", "size"), [("24GB", 24), ("80 GiB", 80), ("40", 40), ("7.5g", 7.5)])
def test_sizes(text: str, size: float) -> None:
    assert bytes_of(text) == size * GIB


@pytest.mark.parametrize("text", ["", "0GB", "-4GB", "lots", "24TB", "1e9", "24GB 8"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="write it as 24GB"):
        bytes_of(text)


def test_the_line_of_check(llama_7b: Make) -> None:
    run, report = llama_7b()
    text = fit_text(fit_facts(run, report, 24 * GIB))
    assert text.startswith("24 GiB: deepspeed=zero2.json train.micro_batch_size=4 train.activation_checkpointing=none ")
    assert "train.activation_memory=0.5" in text and text.endswith("which does not fit")
    assert fit_text(fit_facts(run, report, 80 * GIB)).endswith("which fits")
    assert "nothing fits" in fit_text(fit_facts(run, report, 3 * GIB))
    report.memory_inputs = None
    assert "is not known" in fit_text(fit_facts(run, report, 24 * GIB))


def test_numbers_of_records() -> None:
    for known in RECORDS:
        result = json.loads((ROOT / "eval" / "records" / known.record / "result.json").read_text())
        assert known.gpu in result["hardware"]["gpu"] and result["model"] == "llama-7b"
        assert (result["settings"]["batch"], result["settings"]["seq"]) == (4, 512)
        arms = [
            round(arm["tokens_per_s"])
            for arm in result["arms"]
            if (arm["arm"], arm["loop"], arm["zero"], arm["rank"], arm["gpus"])
            == (known.method, "deepspeed", known.stage, known.rank, known.gpus)
            and arm["compiled"] and not arm["fused_loss"] and not arm["compacted"] and arm["checkpointing"] == "none"
        ]  # fmt: skip
        assert arms == [known.tokens_per_second], known


def test_a_guess_names_its_record(llama_7b: Make) -> None:
    run, report = llama_7b()
    report.facts["tokens"] = {"mean": 100.0}
    found = pace(run, report)
    assert found is not None and found["record"] == "2026-11-22_llama-7b_salientlora_1xh100-4"
    assert found["tokens_per_epoch"] == 6400 and found["hours_per_epoch"] == pytest.approx(6400 / 15897 / 3600)
    assert "one H100, rank 64" in pace_text(found) and "15,897 tokens/s, 0.0 hours per epoch" in pace_text(found)


@pytest.mark.parametrize(
    ("overrides", "gpus"),
    [
        ([], 2), (["train.precision=fp16"], 1), (["train.activation_checkpointing=all"], 1),
        (["train.activation_memory=0.5"], 1), (["adapter.rank=16"], 1), (["data.max_length=128"], 1),
        (["method.name=spectral"], 1), (["adapter.target_modules=[q_proj]"], 1), (["speed.liger=loss"], 1),
    ],
)  # fmt: skip
def test_no_guess_without_a_record(llama_7b: Make, overrides: list[str], gpus: int) -> None:
    assert pace(*llama_7b(*overrides, gpus=gpus)) is None
    assert "no record" in pace_text(None)


def test_the_command_says_both(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], llama_7b: Make
) -> None:
    run, _ = llama_7b()
    # without tokenising, which takes seconds
    monkeypatch.setattr("salient_ds.check.printing.check_start", lambda run, start, path: preflight(run, quick=True))
    path = str(Path(run.model.path) / "run.yaml")
    run_check(path, memory=24 * GIB)
    said = " ".join(capsys.readouterr().out.split())
    assert "fits 24 GiB: deepspeed=zero2.json" in said and "2026-11-22_llama-7b_salientlora_1xh100-4" in said
    run_check(path, as_json=True, memory=24 * GIB)
    facts = json.loads(capsys.readouterr().out)["facts"]
    assert facts["fit"]["settings"]["train.micro_batch_size"] == 4 and facts["pace"]["rank"] == 64
