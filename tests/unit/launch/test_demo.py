"""What the demo decides before it starts anything, and what it says when a step fails."""

from __future__ import annotations

import json
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

import demo
import prepare
import pytest
import yaml
from typer.testing import CliRunner

from salient_ds.cli import app
from salient_ds.strict import ConfigError


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """The script sets variables for the processes that it starts."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def tiny_demo(cache: Path, steps: int | None = None) -> demo.Demo:
    return demo.plan(tiny=True, steps=steps, cache=cache)


def write_run(run: demo.Demo, finished: bool) -> None:
    """What an earlier training leaves in the run directory."""
    (run.run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run.run / "run.yaml").write_text(yaml.safe_dump(run.config.model_dump(mode="json", by_alias=True)))
    if finished:
        run.adapter.mkdir()
        (run.adapter / "adapter_config.json").write_text("{}")


def test_the_default_command_needs_no_overrides() -> None:
    run = demo.plan(tiny=False, steps=None, cache=demo.DEFAULT_CACHE)
    assert [Path(argument).name for argument in run.arguments] == ["demo_smollm2.yaml"]
    assert run.held_out == Path(".demo/sarcasm/held_out.jsonl")


def test_another_cache_and_other_steps_become_overrides(tmp_path: Path) -> None:
    run = tiny_demo(tmp_path, steps=50)
    assert run.config.train.max_steps == 50
    assert run.run == tmp_path / "runs" / "tiny"
    assert run.model == tmp_path / "tiny-llama"
    assert run.train_rows.parent == run.held_out.parent == tmp_path / "animals"
    assert f"output_dir={run.run}" in run.arguments


def test_steps_too_few_for_an_event_are_the_checks_business_not_a_crash(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_steps"):
        tiny_demo(tmp_path, steps=0)


def test_an_unfinished_run_is_continued_and_any_other_replaced(tmp_path: Path) -> None:
    run = tiny_demo(tmp_path)
    assert demo.how_to_start(run) == ""
    write_run(run, finished=False)
    assert demo.how_to_start(run) == "--resume auto"
    assert demo.how_to_start(tiny_demo(tmp_path, steps=60)) == "--overwrite"
    (run.run / "run.yaml").write_text("train: [")
    assert demo.how_to_start(run) == "--overwrite"


def test_a_finished_run_is_replaced(tmp_path: Path) -> None:
    run = tiny_demo(tmp_path)
    write_run(run, finished=True)
    assert demo.how_to_start(run) == "--overwrite"


def test_a_run_that_died_before_it_wrote_anything_is_replaced(tmp_path: Path) -> None:
    run = tiny_demo(tmp_path)
    run.run.mkdir(parents=True)
    assert demo.how_to_start(run) == "--overwrite"


def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    env = demo.environment()
    assert env["OMP_NUM_THREADS"] == "4"
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_training_is_the_real_launcher_on_a_port_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(demo, "execute", seen.append)
    run = tiny_demo(tmp_path)
    demo.train(run)
    write_run(run, finished=True)
    demo.train(run)
    first, second = seen
    assert first[0] == "deepspeed" and first[first.index("--module") + 1] == "salient_ds.train"
    assert 1024 < int(first[first.index("--master_port") + 1]) < 65536
    assert second[-1] == "--overwrite" and first[-1] != "--overwrite"


def test_the_check_knows_how_the_run_will_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second `make demo` was refused by the check, because the first one's run is there."""
    seen: list[list[str]] = []
    monkeypatch.setattr(demo, "execute", seen.append)
    run = tiny_demo(tmp_path)
    for finished, wanted in ((None, []), (False, ["--resume", "auto"]), (True, ["--overwrite"])):
        if finished is not None:
            write_run(run, finished=finished)
        demo.check(run)
        command = seen.pop()
        assert command[:2] == ["salient-ds", "check"] and command[command.index("--gpus") + 2 :] == wanted


@pytest.mark.slow
def test_the_check_lets_an_earlier_run_be_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(demo, "execute", seen.append)
    run = tiny_demo(tmp_path)
    prepare.tiny(run.config, tmp_path, run.held_out)
    write_run(run, finished=True)
    demo.check(run)
    assert CliRunner().invoke(app, seen[0][1:]).exit_code == 0
    assert CliRunner().invoke(app, seen[0][1:-1]).exit_code == 1, "without the option it is refused"


def test_a_command_that_fails_ends_the_demo_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "broken-tool"
    script.write_text("#!/bin/sh\necho reason\nexit 7\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(SystemExit) as ended:
        demo.execute(["broken-tool", "--flag"])
    assert ended.value.code == 7
    out = capfd.readouterr().out
    assert "reason" in out and "broken-tool ended with status 7" in out


def test_a_missing_command_says_how_to_run_the_demo() -> None:
    with pytest.raises(SystemExit, match="make demo"):
        demo.execute(["no-such-launcher"])


def test_the_tiny_demos_files_are_made_without_a_network(tmp_path: Path) -> None:
    run = tiny_demo(tmp_path)
    prepare.tiny(run.config, tmp_path, run.held_out)
    train, held_out = ([json.loads(line) for line in path.open()] for path in (run.train_rows, run.held_out))
    assert (len(train), len(held_out)) == (prepare.TRAIN_ROWS, prepare.HELD_OUT_ROWS)
    assert not {row["input"] for row in train} & {row["input"] for row in held_out}
    assert (run.model / "model.safetensors").is_file() and (run.model / "tokenizer.model").is_file()


def test_ranks_are_drawn(tmp_path: Path) -> None:
    run = tiny_demo(tmp_path)
    run.adapter.mkdir(parents=True)
    ranks = {f"model.layers.{i}.self_attn.{name}": i for i in range(3) for name in ("q_proj", "v_proj")}
    (run.adapter / "salient_ds.json").write_text(json.dumps({"ranks": ranks}))
    demo.show_ranks(run)
    assert (run.run / "ranks.png").read_bytes().startswith(b"\x89PNG")
