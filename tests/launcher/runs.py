"""Start the real ``deepspeed`` launcher on a tiny run, and look at what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from tests.support.spawn import forked, free_port

ROOT = Path(__file__).parents[2]


def write_run(folder: Path, model: Path, data: Path, /, **changes: Any) -> Path:
    """A run YAML of 24 steps with 4 events and a checkpoint every 5 steps; ``changes`` by section."""
    run: dict[str, Any] = {
        "output_dir": str(folder / "run"),
        "deepspeed": str(ROOT / "ds_configs" / "cpu.json"),
        "model": {"path": str(model)},
        "adapter": {"rank": 8, "alpha": 16, "init_std": 0.1, "dropout": 0.1},
        "method": {"name": "salientlora", "target_rank": 3, "initial_warmup": 3, "final_warmup": 4,
                   "window_initial": 3, "window_final": 6},
        "data": {"train": str(data), "eval_size": 8, "max_length": 160},
        "train": {"max_steps": 24, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32", "lr": 0.01,
                  "save_every": 5, "log_every": 1},
    }  # fmt: skip
    for section, values in changes.items():
        run[section] = run.get(section, {}) | values if isinstance(values, dict) else values
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


def environment() -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip


def start(run: Path, *arguments: str, processes: int = 2) -> subprocess.Popen[str]:
    """The launcher as its own process group, output captured."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", str(processes)]
    command += ["--master_port", str(free_port()), "--module", "salient_ds.train", str(run), *arguments]
    return subprocess.Popen(
        command, cwd=run.parent, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip


def alone(run: Path, *arguments: str) -> tuple[int, str]:
    """The same training without a launcher, in one process."""
    output = run.with_suffix(".output")
    status = forked(train, run, arguments, output=output)
    return status, output.read_text()


def train(run: Path, arguments: tuple[str, ...]) -> None:
    """What ``python -m salient_ds.train`` does."""
    import typer

    from salient_ds.train import main

    os.chdir(run.parent)
    sys.argv = ["salient_ds.train", str(run), *arguments]
    typer.run(main)


def finish(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str]:
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def workers(launcher: int) -> list[int]:
    """Process ids of the training processes below a launcher."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes().split(b"\0")
                session = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[3])
            except OSError:
                continue
            if (
                session == launcher
                and b"salient_ds.train" in command
                and any(c.startswith(b"--local_rank") for c in command)
            ):
                found.append(int(entry.name))
    return sorted(found)


def rows(run: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def metrics(run: Path) -> dict[int, float]:
    """Loss by step."""
    return {row["step"]: row["loss"] for row in rows(run) if "loss" in row}


def wait_for_step(run: Path, step: int, process: subprocess.Popen[str], timeout: float = 240) -> None:
    deadline = time.monotonic() + timeout
    while step not in metrics(run):
        assert process.poll() is None, f"the run ended before step {step}:\n{finish(process)[1]}"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.05)


def digests(run: Path) -> list[str]:
    return [json.loads(line)["digest"] for line in (run / "allocations.jsonl").read_text().splitlines()]
