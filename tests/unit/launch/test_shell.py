"""The shell scripts, with stand-ins for the commands that they call."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[3] / "launch"


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH on which every command prints its name and arguments, and the check can be told to fail."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, status in (("salient-ds", "${CHECK_STATUS:-0}"), ("deepspeed", "0")):
        (folder / name).write_text(f'#!/bin/sh\necho "{name} $*"\nexit {status}\n')
        (folder / name).chmod(0o755)
    (folder / "nvidia-smi").write_text('#!/bin/sh\n[ -n "$GPUS" ] && seq "$GPUS"\n')
    (folder / "nvidia-smi").chmod(0o755)
    return folder


def start(tools: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": f"{tools}{os.pathsep}{os.defpath}"} | variables
    return subprocess.run(
        ["bash", str(LAUNCH / "train.sh"), *arguments], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("script", ["train.sh", "slurm.sbatch"])
def test_syntax(script: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)


def test_all_gpus_of_the_node(tools: Path) -> None:
    done = start(tools, "run.yaml", "train.lr=1", GPUS="4")
    assert done.stdout.splitlines() == [
        "salient-ds check run.yaml train.lr=1 --gpus 4",
        "deepspeed --master_port 29500 --num_gpus 4 --module salient_ds.train run.yaml train.lr=1 --resume auto",
    ]


def test_changes_are_for_the_training_only(tools: Path) -> None:
    done = start(tools, "run.yaml", "--change", "train.lr", "train.lr=1", "--change=train.eps", GPUS="1")
    check, train = done.stdout.splitlines()
    assert check == "salient-ds check run.yaml train.lr=1 --gpus 1"
    assert train.endswith("salient_ds.train run.yaml train.lr=1 --resume auto --change train.lr --change=train.eps")
    assert "--change needs a key" in start(tools, "run.yaml", "--change", GPUS="1").stderr


def test_the_example_hostfile_counts_its_slots(tools: Path) -> None:
    done = start(tools, "run.yaml", HOSTFILE=str(LAUNCH / "hostfile.example"), PORT="1234", GPUS="4")
    check, train = done.stdout.splitlines()
    assert check.endswith("--gpus 16")
    assert f"--master_port 1234 --hostfile {LAUNCH / 'hostfile.example'} --module" in train


def test_without_a_gpu_two_cpu_processes(tools: Path) -> None:
    check, train = start(tools, "run.yaml").stdout.splitlines()
    assert check.endswith("--gpus 2") and "--num_accelerators 2" in train


def test_a_failed_check_starts_nothing(tools: Path) -> None:
    done = start(tools, "run.yaml", CHECK_STATUS="1")
    assert done.returncode == 1 and "deepspeed" not in done.stdout


def test_without_arguments_it_says_how_it_is_used(tools: Path) -> None:
    done = start(tools)
    assert done.returncode == 2 and "RUN.yaml" in done.stderr
