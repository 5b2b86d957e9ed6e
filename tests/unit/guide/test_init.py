"""``salient-ds init``: what it writes passes check, fits the memory, and replaces nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from salient_ds.check import token_sample
from salient_ds.check.start import StartOptions, check_start
from salient_ds.cli import app
from salient_ds.config.run import load_config
from salient_ds.guide import answers as answering
from salient_ds.guide.answers import Answers, collect, ready, short_name
from salient_ds.guide.init import write_run
from salient_ds.guide.run_text import target_modules
from salient_ds.guide.schema import run_schema
from salient_ds.guide.zero_files import FILES, zero_text
from salient_ds.methods.increlora.options import IncreLoRAConfig
from salient_ds.methods.options import MethodConfig
from salient_ds.methods.table import methods
from salient_ds.ranks import RankLayout
from salient_ds.strict import ConfigError

ROOT = Path(__file__).resolve().parents[3]
GIB = 2**30


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answers of the tokenizing helper without its process, which takes seconds to start."""
    said: list[dict[str, Any]] = []

    def ask(module: str, question: dict[str, Any]) -> dict[str, Any]:
        token_sample.main(json.loads(json.dumps(question)))
        if "error" in said[-1]:
            raise ValueError(said[-1]["error"])
        return said[-1]

    monkeypatch.setattr(token_sample, "reply", said.append)
    monkeypatch.setattr(token_sample, "ask", ask)


@pytest.mark.parametrize("name", FILES)
def test_zero_files_are_those_of_ds_configs(name: str) -> None:
    assert json.loads(zero_text(name)) == json.loads((ROOT / "ds_configs" / f"{name}.json").read_text())


@pytest.mark.parametrize(("method", "gpus"), [(name, 2 * (i % 2)) for i, name in enumerate(ready())])
def test_the_result_passes_check(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path, method: str, gpus: int) -> None:
    output = tmp_path / "run.yaml"
    given = Answers(str(tiny_llama), str(tiny_alpaca), gpus, 24 * GIB, method)
    run, report, notes = write_run(given, output)
    assert report.problems == [] and notes == []
    again = load_config(output)
    assert again.model_dump(exclude={"deepspeed"}) == run.model_dump(exclude={"deepspeed"})
    assert check_start(again, StartOptions(given.processes), str(output)).problems == []
    sections = yaml.safe_load(output.read_text())
    assert list(jsonschema.Draft7Validator(run_schema()).iter_errors(sections)) == []
    assert again.train.precision == ("bf16" if gpus else "fp32")
    assert report.facts["this_run"]["peak"] < 24 * GIB


@pytest.mark.parametrize("rows", [1, 19, 20])
def test_few_rows(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path, rows: int) -> None:
    data = tmp_path / "few.json"
    data.write_text(json.dumps(json.loads(tiny_alpaca.read_text())[:rows]))
    run, report, _ = write_run(Answers(str(tiny_llama), str(data), 0, 8 * GIB), tmp_path / "run.yaml")
    assert report.problems == []
    assert report.facts["total_steps"] >= 40
    assert (run.data.eval_size == 0) == (rows < 20)
    assert run.train.eval_every == 0 or run.data.eval_size


def test_length_is_that_of_the_data(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    run, report, _ = write_run(Answers(str(tiny_llama), str(tiny_alpaca), 0, 8 * GIB), tmp_path / "run.yaml")
    at_99 = report.facts["tokens"]["lengths"]["99"]
    assert at_99 < run.data.max_length <= at_99 + 32 and run.data.max_length % 32 == 0
    assert report.facts["tokens"]["truncated"] <= 0.02


def test_nothing_is_overwritten(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    given = Answers(str(tiny_llama), str(tiny_alpaca), 0, 8 * GIB)
    output = tmp_path / "run.yaml"
    (tmp_path / "cpu.json").write_text("mine")
    with pytest.raises(ConfigError, match="cpu.json is there already"):
        write_run(given, output)
    assert not output.exists() and (tmp_path / "cpu.json").read_text() == "mine"
    (tmp_path / "cpu.json").write_text(zero_text("cpu"))
    write_run(given, output)
    before = output.read_text()
    with pytest.raises(ConfigError, match=r"run.yaml is there already.*-o"):
        write_run(given, output)
    assert output.read_text() == before


@pytest.mark.parametrize("what", ["model", "data"])
def test_wrong_answers_write_nothing(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path, what: str) -> None:
    wrong = {"model": str(tmp_path / "no-model"), "data": str(tmp_path / "no.json")}[what]
    values = {"model": str(tiny_llama), "data": str(tiny_alpaca), what: wrong}
    command = ["init", "--gpus", "0", "-o", str(tmp_path / "run.yaml")]
    for key, value in values.items():
        command += [f"--{key}", value]
    done = CliRunner().invoke(app, command)
    assert done.exit_code != 0
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_fit_is_refused(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing fits into 1 GiB"):
        write_run(Answers(str(tiny_llama), str(tiny_alpaca), 1, round(0.6 * GIB)), tmp_path / "run.yaml")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_family_says_so(tiny_alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    given = Answers("some/model-that-is-not-here", str(tiny_alpaca), 4, 80 * GIB)
    run, report, notes = write_run(given, tmp_path / "run.yaml")
    assert report.problems == [] and run.train.micro_batch_size == 1
    assert "nothing is known about the model" in notes[0]


class Asked:
    """Answers questions, and remembers them with their defaults."""

    def __init__(self, *answers: object) -> None:
        self.answers, self.questions = list(answers), []  # type: ignore[var-annotated]

    def __call__(self, text: str, default: object = None) -> object:
        self.questions.append((text, default))
        return self.answers.pop(0)


def test_what_is_missing_is_asked() -> None:
    ask = Asked("a/model", "rows.json", 2, "24GB", "spectral")
    found = collect(None, None, None, None, None, ask, found=[])
    assert found == Answers("a/model", "rows.json", 2, 24 * GIB, "spectral")
    ask = Asked("lora")
    assert collect("m", "d", 1, None, None, ask, found=[80 * GIB, 40 * GIB]).memory == 40 * GIB
    assert len(ask.questions) == 1 and ask.questions[0][1] == "salientlora"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ((None, "d", 1, "8GB", None), "--model missing"),
        ((None, None, 1, "8GB", None), "--model and --data missing"),
        (("m", "d", 2, None, None), "--gpu-memory is missing"),
        (("m", "d", 2, "much", None), "--gpu-memory 'much' is no memory"),
        (("m", "d", 2, "0GB", None), "is no memory"),
        (("m", "d", -1, None, None), "--gpus -1"),
        (("m", "d", 0, "8GB", None), "of no use with --gpus 0"),
        (("m", "d", 0, None, "salientlor"), "did you mean 'salientlora'"),
    ],
)
def test_without_a_terminal(given: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        collect(*given, ask=None, found=[])


def test_a_method_with_options_that_init_cannot_choose(monkeypatch: pytest.MonkeyPatch) -> None:
    class Odd(MethodConfig):
        name: Literal["odd"] = "odd"
        knob: int

    monkeypatch.setattr(answering, "methods", lambda: methods() | {"odd": Odd})
    with pytest.raises(ConfigError, match="cannot choose method.knob"):
        collect("m", "d", 0, None, "odd", None, found=[])
    assert "increlora" in ready() and "odd" not in ready()


def test_growth_is_not_guessed_without_the_model_or_the_data(
    tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for model, data, what in (
        ("some/model", str(tiny_alpaca), "the model"),
        (str(tiny_llama), "some/rows", "the data"),
        ("some/model", "some/rows", "the model and the data"),
    ):
        given = Answers(model, data, 4, 80 * GIB, "increlora")
        with pytest.raises(ConfigError, match=f"and {what} could not be looked at"):
            write_run(given, tmp_path / "run.yaml")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", [2, 3, 4, 8, 12.5])
@pytest.mark.parametrize(
    ("matrices", "steps"), [(1, 8), (2, 40), (14, 40), (14, 41), (224, 60), (224, 1219), (96, 10**6)]
)
def test_suggested_growth_ends_before_the_run_does(matrices: int, steps: int, target: float) -> None:
    values = {key: value for key, (value, _) in IncreLoRAConfig.suggested(matrices, steps, target).items()}
    options = IncreLoRAConfig.model_validate({"target_rank": target, **values})
    layout = RankLayout(tuple(map(str, range(matrices))), (16,) * matrices, (64,) * matrices, (64,) * matrices)
    events = options.events(layout, steps)
    assert 1 <= len(events) <= 25 and events[-1].total_rank == round(target * matrices)
    assert events[0].step >= 2 and events[-1].step <= max(steps // 2 + 2, len(events) + 2)
    assert steps < 100 or events[-1].step > 0.4 * steps


def test_gpus_are_those_of_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert answering.gpus_here() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 81559\necho 81559\n")
    tool.chmod(0o755)
    assert answering.gpus_here() == [81559 * 2**20] * 2
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert answering.gpus_here() == []


def test_names_and_layers() -> None:
    assert short_name("meta-llama/Llama-2-7b-hf") == "llama-2-7b-hf"
    assert short_name("./my model/") == "my-model"
    kinds = ("llama", "qwen2", "qwen3", "gemma3_text", "mistral", "phi3")
    assert [target_modules(kind).removeprefix("preset:") for kind in kinds] == [
        "llama", "qwen", "qwen", "gemma", "mistral", "phi3",
    ]  # fmt: skip
    assert target_modules("gpt_neox") == target_modules(None) == "all-linear"
