"""kill -9 in mid-run, then the same command with --resume auto: bit for bit the run that was never killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from salient_ds.run.exits import STOPPED
from tests.launcher import runs


@pytest.fixture(scope="module")
def started(
    tiny_llama: Path, tiny_alpaca: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """An uninterrupted run, on its way while the others are killed beside it."""
    run = runs.write_run(tmp_path_factory.mktemp("whole"), tiny_llama, tiny_alpaca)
    process = runs.start(run)
    yield run.parent / "run", process
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def whole(started: tuple[Path, subprocess.Popen[str]]) -> Path:
    """Directory of the uninterrupted run."""
    return finished(*started)


def finished(run: Path, process: subprocess.Popen[str]) -> Path:
    if process.returncode is None:
        status, output = runs.finish(process)
        assert status == 0, output
    assert process.returncode == 0
    return run


def test_killed_and_resumed_equals_uninterrupted(
    started: tuple[Path, subprocess.Popen[str]], tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path
) -> None:
    """First one training process dies, then one is asked to stop, then everything dies at once."""
    run = runs.write_run(tmp_path, tiny_llama, tiny_alpaca)
    resumed = tmp_path / "run"
    process = runs.start(run)
    runs.wait_for_step(resumed, 8, process)
    os.kill(runs.workers(process.pid)[-1], signal.SIGKILL)
    assert runs.finish(process)[0] != 0
    (resumed / "checkpoints" / "step-00000009.partial").mkdir()  # as a save that was killed leaves it
    process = runs.start(run, "--resume", "auto")
    runs.wait_for_step(resumed, 11, process)
    os.kill(runs.workers(process.pid)[-1], signal.SIGTERM)  # only this process knows of it at first
    status, output = runs.finish(process)
    assert status == STOPPED, output
    assert "stopped after step" in output and "Traceback" not in output
    step = len(runs.metrics(resumed))
    assert (resumed / "checkpoints" / f"step-{step:08d}" / "manifest.json").is_file()
    process = runs.start(run, "--resume", "auto")
    runs.wait_for_step(resumed, max(17, step + 1), process)
    os.killpg(process.pid, signal.SIGKILL)
    assert runs.finish(process)[0] != 0
    status, output = runs.finish(runs.start(run, "--resume", "auto"))
    assert status == 0, output
    assert "continuing from" in output
    whole = finished(*started)
    assert runs.metrics(resumed) == runs.metrics(whole)
    assert len(runs.metrics(whole)) == 24
    assert runs.digests(resumed) == runs.digests(whole)
    assert len(runs.digests(whole)) == 4
    assert output.count("Loading weights: 100%") == 1, "one bar, not one per process"
    assert "FutureWarning" not in output
    for process in (0, 1):
        kept = (resumed / "messages" / f"{process}.log").read_text()
        assert kept.count("started as ") >= 2 and f"RANK={process} " in kept and "WORLD_SIZE=2" in kept
    mine, theirs = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (resumed, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run directory but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_the_run_directory_is_protected(whole: Path, tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    """A finished run is neither overwritten nor mixed with another configuration, and not a byte of it changes."""
    shutil.copytree(whole, tmp_path / "run")
    run = runs.write_run(tmp_path, tiny_llama, tiny_alpaca)
    before = contents(tmp_path / "run")
    assert {"summary.json", "metrics.jsonl", "adapter/adapter_model.safetensors"} <= before.keys()
    status, output = runs.alone(run)
    assert status != 0 and "--resume auto" in output and "--overwrite" in output
    status, output = runs.alone(run, "--resume", "auto", "--change", "train.lr")
    assert status == 0 and "nothing to do: the run of 24 steps is finished" in output
    other = runs.write_run(
        tmp_path, tiny_llama, tiny_alpaca, method={"target_rank": 2}, data={"max_length": 96}, train={"lr": 0.5}
    )
    status, output = runs.alone(other, "--resume", "auto", "--change", "train.lr")
    assert status != 0 and "belongs to another run" in output
    assert "method.target_rank: 3.0 there, 2.0 here" in output
    assert "data.max_length: 160 there, 96 here" in output
    assert "train.lr:" not in output
    assert contents(tmp_path / "run") == before


def test_a_lower_learning_rate_from_a_checkpoint_on(
    whole: Path, tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path
) -> None:
    """Refused without --change; with it, the rate acts from the next step on and is on record."""
    resumed = tmp_path / "run"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000024")
    before = contents(resumed)
    run = runs.write_run(tmp_path, tiny_llama, tiny_alpaca, train={"lr": 0.002})
    status, output = runs.alone(run, "--resume", "auto")
    assert status != 0 and "train.lr: 0.01 there, 0.002 here" in output and "--change train.lr" in output
    assert contents(resumed) == before
    options = ["--resume", "auto", "--change", "train.lr", "--change", "train.eps"]
    status, output = runs.alone(run, *options)
    assert status == 0, output
    assert "changed after step 20: train.lr from 0.01 to 0.002" in output
    assert "--change train.eps changes nothing, because" in output
    rates = [(row["step"], row["lr"]) for row in runs.rows(resumed) if "lr" in row]
    expected = [(step, (0.01 if step <= 20 else 0.002) * (1 - (step - 1) / 24)) for step in range(1, 25)]
    assert rates == [(step, pytest.approx(rate)) for step, rate in expected]
    facts = json.loads((resumed / "run.json").read_text())
    assert facts["changes"] == [{"step": 20, "key": "train.lr", "from": 0.01, "to": 0.002}]
    assert facts["finished"] == 24
    assert "lr: 0.002" in (resumed / "run.yaml").read_text()
    kept = contents(resumed)
    status, output = runs.alone(run, *options)
    assert status == 0 and "nothing to do" in output and contents(resumed) == kept


def test_a_run_that_was_stopped_after_its_last_step_is_finished(
    whole: Path, tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path
) -> None:
    """Its adapter is written, and its summary and last checkpoint are kept."""
    resumed = tmp_path / "run"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "adapter")
    facts = json.loads((resumed / "run.json").read_text())
    (resumed / "run.json").write_text(json.dumps(facts | {"finished": None}))
    before = contents(resumed)
    run = runs.write_run(tmp_path, tiny_llama, tiny_alpaca)
    status, output = runs.alone(run, "--resume", "auto")
    assert status == 0, output
    after = contents(resumed)
    kept = [name for name in before if name.startswith("checkpoints/")] + ["summary.json"]
    assert all(after[name] == before[name] for name in kept)
    assert json.loads(after["run.json"])["finished"] == 24
    mine, theirs = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (resumed, whole))
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


def test_the_adapter_reproduces_the_run_in_peft(whole: Path, tiny_llama: Path, tiny_alpaca: Path) -> None:
    """Held-out loss of base + adapter in real PEFT equals the last one that training logged."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    from salient_ds.config.run import load_config
    from salient_ds.models.loading import load_tokenizer
    from salient_ds.run.inputs import evaluation_batches, load_inputs

    config = load_config(whole.parent / "run.yaml")
    inputs = load_inputs(config, load_tokenizer(config.model))
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), whole / "adapter").eval()
    total = targets = 0.0
    with torch.no_grad():
        for batch in evaluation_batches(inputs, 0, 1, 2, torch.device("cpu")):
            total += float(model(**batch.inputs).loss) * batch.num_targets
            targets += batch.num_targets
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    logged = [row["eval_loss"] for row in rows if "eval_loss" in row][-1]
    assert total / targets == pytest.approx(logged, abs=1e-5)
    with torch.no_grad(), model.disable_adapter():
        plain = sum(
            float(model(**b.inputs).loss) * b.num_targets
            for b in evaluation_batches(inputs, 0, 1, 2, torch.device("cpu"))
        )
    assert plain / targets > logged + 0.05  # training did something
