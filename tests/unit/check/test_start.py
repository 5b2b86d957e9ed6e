"""What `salient-ds check` promises with "ready to start": each of these runs died after minutes before."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from salient_ds.check import libraries, token_sample
from salient_ds.check.preflight import preflight
from salient_ds.check.printing import run_check
from salient_ds.check.start import StartOptions, check_start
from salient_ds.config.run import RunConfig, load_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def run_file(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> Path:
    """A sound run: 64 rows, 32 steps."""
    content = {
        "output_dir": str(tmp_path / "run"),
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "model": {"path": str(tiny_llama)},
        "adapter": {"rank": 8},
        "method": {"name": "salientlora", "target_rank": 2, "window_initial": 3, "window_final": 5},
        "data": {"train": str(tiny_alpaca), "max_length": 200},
        "train": {"epochs": 2, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "precision": "fp32"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The helper's answers without its process, which takes seconds to start. One test has the real one."""

    def ask(module: str, question: dict[str, Any]) -> dict[str, Any]:
        said: list[dict[str, Any]] = []
        monkeypatch.setattr(token_sample, "reply", said.append)
        token_sample.main(json.loads(json.dumps(question)))
        if "error" in said[-1]:
            raise ValueError(said[-1]["error"])
        return json.loads(json.dumps(said[-1]))

    monkeypatch.setattr(token_sample, "ask", ask)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        yield int(listener.getsockname()[1])


def load(path: Path, *overrides: str) -> RunConfig:
    return load_config(str(path), list(overrides))


def test_tokens_of_a_sound_run(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_check(str(run_file)) == 0
    out = capsys.readouterr().out
    monkeypatch.undo()
    report = check_start(load(run_file), StartOptions())  # with a process of its own
    tokens = report.facts["tokens"]
    assert report.problems == [] and tokens["examples"] == 64
    assert tokens["lengths"]["50"] <= tokens["lengths"]["99"] <= tokens["lengths"]["100"] <= 200
    assert 0 < tokens["targets"]["50"] < tokens["lengths"]["50"] and tokens["truncated"] == tokens["dropped"] == 0
    asked, answered = tokens["example"]
    row = json.loads(Path(load(run_file).data.train).read_text())[0]
    assert not asked["trained"] and row["input"] in asked["text"]
    assert answered["trained"] and answered["text"].strip().startswith(row["output"])
    assert f">>{answered['text']}<<" in out and "0.0% are cut at data.max_length" in out


def test_no_answer_is_left(run_file: Path) -> None:
    """For every template, not only for the tokenizer's own."""
    for template in ("alpaca", "llama-2"):
        report = check_start(load(run_file, "data.max_length=12", f"data.template={template}"), StartOptions())
        (problem,) = report.problems
        assert "data.max_length=12 leaves no answer token in any of the 64 examples" in problem
        enough = int(problem.partition("raise it to ")[2].split()[0])
        again = load(run_file, f"data.max_length={enough}", f"data.template={template}")
        assert check_start(again, StartOptions()).problems == []


def test_some_answers_are_lost(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"instruction": "Say it.", "output": "red"}] * 3 + [{"instruction": "red stone " * 200, "output": "red"}]
    (tmp_path / "long.json").write_text(json.dumps(16 * rows))
    report = check_start(load(run_file, f"data.train={tmp_path / 'long.json'}"), StartOptions())
    assert report.problems == [] and report.facts["tokens"]["dropped"] == 0.25
    assert any("25.0% of 64 examples have no answer token within data.max_length=200" in note for note in report.notes)
    (tmp_path / "long.json").write_text(json.dumps(16 * rows[::-1]))
    monkeypatch.setattr("salient_ds.check.start.SAMPLE", 1)
    report = check_start(load(run_file, f"data.train={tmp_path / 'long.json'}"), StartOptions())
    assert report.problems == [], "the sample alone has no answer, but the data has"


@pytest.mark.parametrize("section", ["tensorboard", "wandb"])
def test_monitors_that_are_not_installed(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str
) -> None:
    zero = json.loads((ROOT / "ds_configs" / "zero2.json").read_text()) | {section: {"enabled": True}}
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    run = load(run_file, f"deepspeed={tmp_path / 'zero.json'}")
    monkeypatch.setattr(libraries, "_there", lambda package: package != section)
    for quick in (False, True):
        (problem,) = preflight(run, quick=quick).problems
        assert f'has "{section}"' in problem and f"pip install {section}" in problem
    monkeypatch.setattr(libraries, "_there", lambda package: True)
    assert preflight(run, quick=True).problems == []


@pytest.mark.parametrize("name", ["salient_ds", "torch"])
def test_a_folder_that_hides_a_package(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As a clone named salient_ds does, for the directory above it."""
    run = load(run_file)
    monkeypatch.chdir(tmp_path)
    assert not any("hides" in problem for problem in check_start(run, StartOptions()).problems)
    (tmp_path / name / name).mkdir(parents=True)
    (problem,) = [problem for problem in check_start(run, StartOptions()).problems if "hides" in problem]
    assert f"{tmp_path / name} hides the installed package {name}" in problem
    (tmp_path / name / "__init__.py").touch()  # the package itself: somebody works in its repository
    assert not any("hides" in problem for problem in check_start(run, StartOptions()).problems)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_loggers_that_are_not_installed(run_file: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    run = load(run_file, f"train.log=[csv,{name}]")
    monkeypatch.setattr(libraries, "_there", lambda package: package != name)
    for quick in (False, True):
        (problem,) = preflight(run, quick=quick).problems
        assert problem == f"train.log has {name}, which is not installed here: pip install {name}, or take it out"
    monkeypatch.setattr(libraries, "_there", lambda package: True)
    assert preflight(run, quick=True).problems == []


def test_flash_attention_that_is_not_installed(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = load(run_file, "model.attn_implementation=flash_attention_2", "train.precision=bf16")
    monkeypatch.setattr(libraries, "_there", lambda package: False)
    problems = preflight(run, quick=True).problems
    assert any("attn_implementation=flash_attention_2 needs the package flash-attn" in p for p in problems)
    monkeypatch.setattr(libraries, "_there", lambda package: package == "flash_attn")
    assert not any("flash-attn" in problem for problem in preflight(run, quick=True).problems)


def test_a_used_directory(run_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "run.yaml").write_text("")
    (problem,) = check_start(load(run_file), StartOptions()).problems
    assert "already holds a run" in problem and "--resume auto" in problem and "--overwrite" in problem
    for wanted in (StartOptions(resume="auto"), StartOptions(overwrite=True)):
        report = check_start(load(run_file), wanted)
        assert report.problems == [] and any("already holds a run" in note for note in report.notes)
    assert preflight(load(run_file)).problems == [], "what a sweep asks"


def test_a_taken_port(run_file: Path, taken_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = check_start(load(run_file), StartOptions(port=taken_port)).problems
    assert problem == f"port {taken_port} of this machine is taken: choose another with --master-port"
    assert check_start(load(run_file), StartOptions(port=taken_port, elsewhere=True)).problems == []
    from salient_ds.run import verbs

    commands: list[list[str]] = []
    monkeypatch.setattr(verbs.os, "execv", lambda program, command: commands.append(command))
    given = ["--master_port", str(taken_port)]
    more: dict[str, Any] = {"resume": "never", "changes": [], "overwrite": False, "processes": 1}
    assert verbs.launch(str(run_file), [], launcher=given, **more) == 1 and not commands
    monkeypatch.setattr(verbs, "is_taken", lambda port: True)
    verbs.launch(str(run_file), [], launcher=[], **more)
    assert int(commands[0][commands[0].index("--master_port") + 1]) not in (taken_port, 29500)


def test_no_step_follows_the_last_event(run_file: Path) -> None:
    def warned(*overrides: str) -> bool:
        return any("no steps follow the last event" in note for note in preflight(load(run_file, *overrides)).notes)

    assert not warned() and not warned("method.final_warmup=0.2")
    assert warned("method.final_warmup=0") and warned("method.preset=paper")
