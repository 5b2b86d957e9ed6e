"""Runs that are killed, and run directories that are damaged on purpose."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from salient_ds.monitor.metrics import read_metrics
from tests.launcher import runs
from tests.support.spawn import forked_process, free_port

STEPS = 24


def losses(run: Path) -> dict[int, float]:
    """Loss by step, from the log."""
    return {row["step"]: row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row}


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The exported adapter."""
    return load_file(run / "adapter" / "adapter_model.safetensors")


def differences(run: Path, reference: Path) -> list[str]:
    """In what a finished run differs from the one that nothing happened to."""
    found = [] if losses(run) == losses(reference) else ["losses"]
    found += [] if runs.digests(run) == runs.digests(reference) else ["decisions"]
    mine, theirs = weights(run), weights(reference)
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    return found + ([] if same else ["adapter"])


def kill_at_random(run_file: Path, draw: random.Random, longest: float) -> bool:
    """Start or resume a run, and kill it after a random time. Returns whether it was still running."""
    output = run_file.with_suffix(".output")
    process = forked_process(runs.train, run_file, ("--resume", "auto"), output=output)
    process.join(draw.uniform(0.0, longest))
    alive = process.is_alive()
    if alive:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert alive or process.exitcode == 0, output.read_text()
    return alive


def duration(run_file: Path) -> float:
    """Seconds of a whole run, which only spread the kills over it."""
    began = time.monotonic()
    status, output = runs.alone(run_file)
    assert status == 0, output
    return time.monotonic() - began


def debris(run: Path) -> list[str]:
    """What a killed process may leave and a finished run must not have."""
    return [
        str(path.relative_to(run))
        for pattern in ("**/*.partial", "**/.*.new", "**/*.new")
        for path in run.glob(pattern)
    ]


def member(run_file: Path, arguments: tuple[str, ...], rank: int, size: int, port: int) -> None:
    """One training process of several, as a launcher would start it."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")  # fmt: skip
    torch.set_num_threads(1)
    runs.train(run_file, arguments)


@dataclass
class Group:
    """Training processes without a launcher, which would end all of them when one has ended."""

    run_file: Path
    processes: list[Any]

    @classmethod
    def start(cls, run_file: Path, *arguments: str, size: int = 2) -> Group:
        port, found = free_port(), []
        for rank in range(size):
            output = run_file.with_suffix(f".{rank}")
            found.append(forked_process(member, run_file, arguments, rank, size, port, output=output))
        return cls(run_file, found)

    def wait_for_step(self, step: int, seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while step not in runs.metrics(self.run_file.parent / "run"):
            assert all(process.is_alive() for process in self.processes), self.output()
            assert time.monotonic() < deadline, self.output()
            time.sleep(0.02)

    def signal(self, rank: int, number: signal.Signals) -> None:
        os.kill(self.processes[rank].pid, number)

    def end_of(self, rank: int, seconds: float) -> int | None:
        """The exit status of a process; None if it still runs after so many seconds."""
        self.processes[rank].join(seconds)
        status: int | None = self.processes[rank].exitcode
        return status

    def output(self, rank: int | None = None) -> str:
        ranks = range(len(self.processes)) if rank is None else [rank]
        return "".join(self.run_file.with_suffix(f".{k}").read_text() for k in ranks)

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()


@dataclass(frozen=True)
class Damage:
    """One thing done to one file."""

    name: str
    zeroed: bool
    place: float
    bit: int

    def apply(self, run: Path) -> None:
        """Flip a bit, or zero 4 KiB."""
        path = run / self.name
        content = bytearray(path.read_bytes())
        at = min(int(self.place * len(content)), len(content) - 1)
        if self.zeroed:
            content[at : at + 4096] = bytes(len(content[at : at + 4096]))
        else:
            content[at] ^= 1 << self.bit
        path.write_bytes(content)


def files_of(run: Path) -> list[str]:
    """Every file of a run directory but pictures and the lock."""
    names = [str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()]
    return sorted(name for name in names if not name.endswith((".png", ".lock")))


def damages(run: Path, count: int, seed: int = 0) -> list[Damage]:
    """``count`` kinds of damage, over all files in turn: flipped bits, and every fourth time a zeroed block."""
    draw, names = random.Random(seed), files_of(run)
    draw.shuffle(names)
    return [Damage(names[k % len(names)], k % 4 == 3, draw.random(), draw.randrange(8)) for k in range(count)]


def interrupted(whole: Path, target: Path) -> Path:
    """A copy of a finished run as it was when four steps were left."""
    shutil.copytree(whole, target)
    shutil.rmtree(target / "checkpoints" / f"step-{STEPS:08d}")
    return target


def resume(run_file: Path) -> tuple[int, str]:
    """Continue a run to its end: exit status and output."""
    return runs.alone(run_file, "--resume", "auto")


def facts(run: Path) -> dict[str, object]:
    """run.json."""
    return dict(json.loads((run / "run.json").read_text()))
