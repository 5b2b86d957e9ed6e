"""Answers on two processes of the real launchers: questions shared out, and one model split by DeepSpeed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.runs import environment
from tests.support.spawn import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def answers(folder: Path, name: str) -> list[object]:
    lines = (folder / "salient_own" / "model_answer" / f"{name}.jsonl").read_text().splitlines()
    return [[row[key] for key in ("question_id", "choices", "statuses", "tokens")] for row in map(json.loads, lines)]


def run(folder: Path, model: Path, name: str, launcher: list[str], *options: str) -> str:
    command = [sys.executable, "-m", *launcher, "mt-bench", "generate", str(model), "--template", "alpaca"]
    command += ["--questions", "own", "--max-new-tokens", "16", "--batch-size", "4", "--data", str(folder)]
    done = subprocess.run(
        [*command, "--model-id", name, *options], env=environment(), text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_two_processes_of_each_launcher_answer_as_one(tiny_llama: Path, tmp_path: Path) -> None:
    run(tmp_path, tiny_llama, "one", ["salient_ds.cli"])
    port = ["--master_port", str(free_port())]
    torchrun = ["torch.distributed.run", "--nproc_per_node", "2", *port, "-m", "salient_ds.cli"]
    said = run(tmp_path, tiny_llama, "shared", torchrun)
    assert "8/8" in said, "the main process answers half of the questions"
    deepspeed = ["deepspeed.launcher.runner", "--num_accelerators", "2", *port, "--no_local_rank", "--module"]
    said = run(tmp_path, tiny_llama, "shared-too", [*deepspeed, "salient_ds.cli"])
    assert "8/8" in said and "AutoTP" not in said
    said = run(tmp_path, tiny_llama, "split", [*deepspeed, "salient_ds.cli"], "--tensor-parallel", "2")
    assert "16/16" in said and "AutoTP" in said
    one = answers(tmp_path, "one")
    assert all(answers(tmp_path, name) == one for name in ("shared", "shared-too", "split"))


def test_tensor_parallelism_wants_all_processes(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="must be the launcher's number of processes, 1, or 1"):
        run(tmp_path, tiny_llama, "one", ["salient_ds.cli"], "--tensor-parallel", "2")
