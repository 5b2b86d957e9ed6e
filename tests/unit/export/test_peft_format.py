"""The files of a PEFT directory, and what is refused before anything is written."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from salient_ds.export.api import export_adapter
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.meta import ExportMeta
from salient_ds.export.peft_format import VLLM_RANKS, padded_rank
from tests.support.verify import verify_peft
from tests.unit.export.builders import Case, build


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def test_ragged_directory(llama: Case, out: Path) -> None:
    export_adapter(llama.factors, llama.meta, out, "peft", llama.base)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "salient_ds.json",
    ]  # fmt: skip
    config, tensors = config_of(out), load_file(out / "adapter_model.safetensors")
    live = {f.name: f.rank for f in llama.factors if f.rank}
    assert set(config["target_modules"]) == set(live) and len(live) < len(llama.factors)
    assert config["rank_pattern"] == live
    assert "alpha_pattern" not in config, "llama.cpp and vLLM do not read it"
    assert config["r"] == config["lora_alpha"] == max(live.values())
    assert config["base_model_name_or_path"] == str(llama.base.resolve()) and config["task_type"] == "CAUSAL_LM"
    assert len(tensors) == 2 * len(live)
    for name, rank in live.items():
        assert tensors[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank
        assert tensors[f"base_model.model.{name}.lora_B.weight"].shape[1] == rank
    assert {value.dtype for value in tensors.values()} == {torch.float32}


def test_padded_directory_holds_every_module_at_one_rank(llama: Case, out: Path) -> None:
    export_adapter(llama.factors, llama.meta, out, "padded", llama.base, torch.bfloat16, pad_to=7)
    config, tensors = config_of(out), load_file(out / "adapter_model.safetensors")
    assert config["rank_pattern"] == {} and "alpha_pattern" not in config and config["r"] == config["lora_alpha"] == 7
    assert len(tensors) == 2 * len(llama.factors)
    for factors in llama.factors:
        A_PI = tensors[f"base_model.model.{factors.name}.lora_A.weight"]
        B_OP = tensors[f"base_model.model.{factors.name}.lora_B.weight"]
        assert A_PI.dtype == torch.bfloat16 and A_PI.shape[0] == B_OP.shape[1] == 7
        assert A_PI[factors.rank :].abs().sum() == B_OP[:, factors.rank :].abs().sum() == 0


def test_record(llama: Case, out: Path) -> None:
    export_adapter(llama.factors, llama.meta, out, "peft", llama.base)
    record = json.loads((out / "salient_ds.json").read_text())
    assert record["ranks"] == {f.name: f.rank for f in llama.factors}
    assert record["total_rank"] == sum(f.rank for f in llama.factors)
    assert (record["method"], record["form"], record["dtype"]) == ("salientlora", "ragged", "float32")
    assert record["template"] == {"name": "alpaca", "hash": "abc"} and record["source_run"] == llama.meta.source_run
    assert record["versions"]["salient_ds"] and record["versions"]["torch"] == torch.__version__


def test_two_exports_are_equal_byte_for_byte(llama: Case, tmp_path: Path) -> None:
    for name in ("a", "b"):
        export_adapter(llama.factors, llama.meta, tmp_path / name, "peft", llama.base)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_hub_name_of_the_base_is_kept(llama: Case, tmp_path: Path) -> None:
    export_adapter(llama.factors, llama.meta, tmp_path / "a", "peft", "some/model")
    export_adapter(llama.factors, replace(llama.meta, base_model="x/y"), tmp_path / "b", "peft", llama.base)
    assert config_of(tmp_path / "a")["base_model_name_or_path"] == "some/model"
    assert config_of(tmp_path / "b")["base_model_name_or_path"] == "x/y"


@pytest.mark.parametrize(("largest", "pad_to", "expected"), [(6, None, 6), (6, "vllm", 8), (1, "vllm", 1), (6, 9, 9)])
def test_padded_rank(largest: int, pad_to: int | str | None, expected: int) -> None:
    assert padded_rank(largest, pad_to) == expected  # type: ignore[arg-type]
    assert all(padded_rank(value, "vllm") == value for value in VLLM_RANKS)


def test_padded_rank_out_of_range() -> None:
    with pytest.raises(ValueError, match="pad_to=5 is below the largest rank 6"):
        padded_rank(6, 5)
    with pytest.raises(ValueError, match="513 exceeds vLLM's maximum of 512"):
        padded_rank(513, "vllm")


def one(name: str, mask: list[int], wide: int = 32, tall: int = 32) -> AdapterFactors:
    draw, rank = torch.Generator().manual_seed(0), len(mask)
    A_RI, B_OR = torch.randn(rank, wide, generator=draw), torch.randn(tall, rank, generator=draw)
    return AdapterFactors(name, A_RI, torch.ones(rank), B_OR, torch.tensor(mask, dtype=torch.bool), 1.0)


@pytest.mark.parametrize("form", ["peft", "padded", "merged"])
def test_nothing_to_export(llama: Case, out: Path, form: str) -> None:
    empty = [replace(f, mask=torch.zeros_like(f.mask)) for f in llama.factors]
    with pytest.raises(ValueError, match="all 14 adapted modules have rank 0"):
        export_adapter(empty, llama.meta, out, form, llama.base)
    with pytest.raises(ValueError, match="modules given twice: .*q_proj"):
        export_adapter([*llama.factors, llama.factors[0]], llama.meta, out, form, llama.base)
    assert not out.exists()


def test_options_of_another_form(llama: Case, out: Path) -> None:
    with pytest.raises(ValueError, match="pad_to=8 belongs to the padded form"):
        export_adapter(llama.factors, llama.meta, out, "peft", llama.base, pad_to=8)
    with pytest.raises(ValueError, match="pad_to=8 belongs to the padded form: a merged model has no ranks"):
        export_adapter(llama.factors, llama.meta, out, "merged", llama.base, pad_to=8)
    with pytest.raises(ValueError, match="applies to the merged form only"):
        export_adapter(llama.factors, llama.meta, out, "peft", llama.base, config_updates={"a": 1})
    with pytest.raises(ValueError, match="task_type='LM' is unknown: use one of CAUSAL_LM"):
        ExportMeta("lora", "LM", "run")  # type: ignore[arg-type]


def test_value_too_large_for_fp16(llama: Case, out: Path) -> None:
    huge = replace(one("model.layers.0.self_attn.q_proj", [1, 1]), scaling=1e12)
    with pytest.raises(
        ValueError, match=r"lora_A of 'model.layers.0.self_attn.q_proj' reaches .* too large for torch.float16"
    ):
        export_adapter([huge], llama.meta, out, "peft", llama.base, torch.float16)
    assert not out.exists()


class Nested(torch.nn.Module):
    """The path of one module is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(32, 32)])
        self.vision = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(32, 32)])})

    def prepare_inputs_for_generation(self) -> None:
        """PEFT's class for causal models asks for it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vision["layers"][0](self.layers[0](x))


def test_dots_are_escaped_only_where_they_would_match_another_path(llama: Case, out: Path) -> None:
    """PEFT 0.13 does not find a path that is escaped."""
    export_adapter([one("m.a.b", [1, 0]), one("m.a_b", [1, 1]), one("m.c", [1, 1])], llama.meta, out, "ragged", "none")
    assert config_of(out)["rank_pattern"] == {r"m\.a\.b": 1, "m.a_b": 2, "m.c": 2}
    from peft.utils.other import get_pattern_key

    keys = list(config_of(out)["rank_pattern"])
    assert [get_pattern_key(keys, name) for name in ("m.a.b", "m.a_b", "m.c")] == keys


@pytest.mark.parametrize("inner", [[1, 1, 1], [0, 0, 0]], ids=["both", "inner_off"])
def test_paths_that_end_alike_keep_their_own_rank(llama: Case, out: Path, inner: list[int]) -> None:
    from peft import PeftModel

    torch.manual_seed(0)
    model, x = Nested(), torch.randn(4, 32)
    factors = [one("layers.0", [1, 0, 1]), one("vision.layers.0", inner)]
    export_adapter(factors, llama.meta, out, "peft", "none")
    expected = x
    for layer, f in ((model.layers[0], factors[0]), (model.vision["layers"][0], factors[1])):
        delta_OI = f.B @ torch.diag(f.mask.float()) @ f.A
        expected = layer(expected) + expected @ delta_OI.T
    loaded = PeftModel.from_pretrained(model, out)
    assert (loaded.base_model.model(x) - expected).abs().max() < 1e-3 * expected.abs().max()
    wrapped = [n for n, m in loaded.named_modules() if hasattr(m, "lora_A")]
    assert len(wrapped) == (2 if any(inner) else 1), "a module at rank 0 is left as it is"


def test_head_of_a_classifier(case_of, tmp_path: Path) -> None:
    """PEFT does not load a SEQ_CLS adapter without its head: taken from the base, or given if trained."""
    case = case_of("bert")
    export_adapter(case.factors, case.meta, tmp_path / "frozen", "peft", case.base)
    assert config_of(tmp_path / "frozen")["modules_to_save"] == ["classifier"]
    trained = {"classifier.weight": torch.ones(3, 32), "classifier.bias": torch.arange(3.0)}
    export_adapter(case.factors, case.meta, tmp_path / "trained", "peft", case.base, trained=trained)
    stored = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert torch.equal(stored["base_model.model.classifier.bias"], torch.arange(3.0))
    logits = []
    for name in ("frozen", "trained"):
        logits.append(verify_peft(tmp_path / name, case.base, case.inputs, torch.zeros(2, 3)))
    assert logits[0] != logits[1]


def test_head_that_is_nowhere(case_of, llama: Case, out: Path) -> None:
    case = case_of("bert")
    with pytest.raises(ValueError, match=r"SEQ_CLS needs the head \(classifier or score\)"):
        export_adapter(case.factors, case.meta, out, "peft", llama.base)


def test_adapter_on_the_head(case_of, out: Path) -> None:
    case = case_of("bert")
    with pytest.raises(ValueError, match="classifier lie inside classifier, which PEFT restores whole"):
        export_adapter([one("classifier", [1], 32, 3)], case.meta, out, "peft", case.base)


def test_verify_without_peft(llama: Case, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_adapter(llama.factors, llama.meta, out, "peft", llama.base)
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        verify_peft(out, llama.base, llama.inputs, llama.logits)


def test_verify_finds_missing_weights(llama: Case, out: Path) -> None:
    export_adapter(llama.factors, llama.meta, out, "peft", llama.base)
    config = config_of(out)
    config["target_modules"].append(next(f.name for f in llama.factors if f.rank == 0))
    (out / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is incomplete for this base model"):
        verify_peft(out, build("llama"), llama.inputs, llama.logits)
