"""kill -9 in mid-run, then the same command with --resume auto: bit for bit the run that was never killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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
    """First one training process dies, then, in the resumed run, everything at once."""
    run = runs.write_run(tmp_path, tiny_llama, tiny_alpaca)
    resumed = tmp_path / "run"
    process = runs.start(run)
    runs.wait_for_step(resumed, 8, process)
    os.kill(runs.workers(process.pid)[-1], signal.SIGKILL)
    assert runs.finish(process)[0] != 0
    (resumed / "checkpoints" / "step-00000009.partial").mkdir()  # as a save that was killed leaves it
    process = runs.start(run, "--resume", "auto")
    runs.wait_for_step(resumed, 17, process)
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
    mine, theirs = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (resumed, whole))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_the_run_directory_is_protected(whole: Path, tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    """A finished run is neither overwritten nor mixed with another configuration."""
    shutil.copytree(whole, tmp_path / "run")
    run = runs.write_run(tmp_path, tiny_llama, tiny_alpaca)
    before = runs.metrics(tmp_path / "run")
    status, output = runs.alone(run)
    assert status != 0 and "--resume auto" in output and "--overwrite" in output
    other = runs.write_run(tmp_path, tiny_llama, tiny_alpaca, method={"target_rank": 2})
    status, output = runs.alone(other, "--resume", "auto")
    assert status != 0 and "belongs to another run" in output and "target_rank" in output
    assert runs.metrics(tmp_path / "run") == before


def test_the_adapter_reproduces_the_run_in_peft(whole: Path, tiny_llama: Path, tiny_alpaca: Path) -> None:
    """Held-out loss of base + adapter in real PEFT equals the last one that training logged."""
    import json

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
