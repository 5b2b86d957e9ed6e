"""The ``check`` verb as a user calls it: a process of its own, exit status, both output forms, light imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_alpaca: Path) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    run = {
        "output_dir": str(folder / "out"),
        "deepspeed": str(ROOT / "ds_configs" / "cpu.json"),
        "model": {"path": str(tiny_llama)},
        "adapter": {"rank": 8},
        "method": {"name": "salientlora", "target_rank": 2, "window_initial": 3, "window_final": 5},
        "data": {"train": str(tiny_alpaca)},
        "train": {"epochs": 2, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "precision": "fp32"},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def salient_ds(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "salient_ds.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_a_sound_run(run_file: Path) -> None:
    warmups = "method.initial_warmup=0", "method.final_warmup=0"
    done = salient_ds("check", str(run_file), *warmups, "--gpus", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for text in (
        "14 matrices, rank 8",
        "112 -> 28",
        "2 x 1 accumulated x 2 processes",
        "allocation events",
        "...",
        "zero3_offload",
        "zero2 *",
        "ready to start",
    ):
        assert text in done.stdout, text
    last_event = [line for line in done.stdout.splitlines() if line.split()[1:3] == ["32", "28"]]
    assert len(last_event) == 1


def test_every_problem_and_exit_status_1(run_file: Path) -> None:
    overrides = ["data.template=alpacca", "adapter.target_modules=[q_prj]", "train.global_batch_size=6"]
    done = salient_ds("check", str(run_file), *overrides, "--gpus", "2")
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert "alpaca" in done.stderr and "did you mean 'q_proj'" in done.stderr
    assert f"{run_file}: train.global_batch_size=6 is not a multiple" in done.stderr
    assert "ready" not in done.stdout


def test_a_broken_run_file(run_file: Path) -> None:
    done = salient_ds("check", str(run_file), "train.lrr=1", "adapter.rnk=2")
    assert done.returncode == 1 and done.stdout == ""
    assert "did you mean 'lr'?" in done.stderr and "did you mean 'rank'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_json_output(run_file: Path) -> None:
    done = salient_ds("check", str(run_file), "--json")
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["problems"] == []
    assert report["facts"]["events"][-1]["total_rank"] == 28
    broken = salient_ds("check", str(run_file), "method.gamma=1", "--json")
    assert broken.returncode == 1 and "method.gamma=1" in json.loads(broken.stdout)["problems"][0]


def test_square_brackets_are_not_markup(run_file: Path) -> None:
    done = salient_ds("check", str(run_file), "data.train=someone/data[train]", "train.max_steps=20")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("someone/data[train]") == 2


def test_check_never_imports_a_heavy_library(run_file: Path) -> None:
    program = f"""
import sys
from salient_ds.check.printing import run_check
code = run_check({str(run_file)!r}, [], 2)
names = ("torch", "deepspeed", "transformers", "datasets", "accelerate", "peft")
heavy = [name for name in names if name in sys.modules]
print("heavy:", heavy, code)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.stdout.splitlines()[-1] == "heavy: [] 0", done.stdout[-500:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--change", "train.lr"], "error: --change train.lr does nothing without --resume: add --resume auto, or"),
        (
            ["--resume", "auto", "--change", "train.seed"],
            "error: --change train.seed is not possible, because the order",
        ),
    ],
)
def test_changes_are_checked_before_anything_starts(run_file: Path, options: list[str], expected: str) -> None:
    done = salient_ds("train", str(run_file), *options)
    assert done.returncode == 1 and expected in done.stderr
    assert not (run_file.parent / "out").exists()


def test_changes_reach_the_training_processes(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from salient_ds.run import verbs

    commands = []
    monkeypatch.setattr(verbs.os, "execv", lambda program, command: commands.append(command))
    verbs.launch(str(run_file), ["train.lr=1e-4"], launcher=[], resume="auto", changes=["train.lr", "train.eps"],
                 overwrite=False, processes=2)  # fmt: skip
    script = ["salient_ds.train", str(run_file), "train.lr=1e-4", "--resume", "auto"]
    assert commands[0][-9:] == [*script, "--change", "train.lr", "--change", "train.eps"]


def test_ssh_notices_a_cut_cable(monkeypatch: pytest.MonkeyPatch) -> None:
    from salient_ds.run import verbs

    monkeypatch.setattr(verbs.os, "execv", lambda program, command: None)
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "")
    monkeypatch.delenv("PDSH_SSH_ARGS_APPEND")
    verbs._become_launcher(["salient_ds.train", "run.yaml"], [], 2)
    assert "PDSH_SSH_ARGS_APPEND" not in os.environ
    verbs._become_launcher(["salient_ds.train", "run.yaml"], ["--hostfile", "hosts"], 2)
    assert "ServerAliveInterval" in os.environ["PDSH_SSH_ARGS_APPEND"]
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-p 2222")
    verbs._become_launcher(["salient_ds.train", "run.yaml"], ["--hostfile", "hosts"], 2)
    assert os.environ["PDSH_SSH_ARGS_APPEND"] == "-p 2222", "the user's own"
