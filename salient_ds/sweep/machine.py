"""The worker processes on this machine: how many, on which GPU, started, watched and stopped. No torch."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from salient_ds.strict import ConfigError
from salient_ds.sweep.spec import SweepSpec
from salient_ds.sweep.worker import PARENT, alone

RESTARTS = 3
"""How often a worker that died is replaced, as long as no run ends in between."""
GRACE = 120.0
"""Seconds that workers have to save a checkpoint when the sweep is stopped."""


def gpus() -> list[str]:
    """The devices that runs may use, as values of CUDA_VISIBLE_DEVICES. Empty: runs are on CPU.

    torch answers, in a process of its own.

    Raises:
        ConfigError: torch cannot be asked.
    """
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        return []
    command = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        number = int(done.stdout.split()[-1])
    except (IndexError, ValueError):
        reason = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        raise ConfigError([f"torch could not be asked for GPUs ({reason}): set jobs to a number"]) from None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else [str(i) for i in range(number)]
    return names[:number]


@dataclass(frozen=True)
class Places:
    """Where the workers of this machine run."""

    jobs: int
    devices: list[str]
    """GPU of every worker, in turn; empty: all on CPU."""

    def environment(self, index: int) -> dict[str, str]:
        """Environment of worker number ``index``: its GPU, or its share of the cores."""
        env = alone() | {PARENT: str(os.getpid())}
        if self.devices:
            return env | {"CUDA_VISIBLE_DEVICES": self.devices[index % len(self.devices)]}
        env.setdefault("DS_ACCELERATOR", "cpu")
        env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // max(1, self.jobs))))
        return env


def places(spec: SweepSpec, jobs: int | None) -> Places:
    """How many workers to start here.

    Args:
        jobs: replaces ``jobs`` of the sweep file; None: as it says.
    """
    wanted = spec.jobs if jobs is None else jobs
    if wanted == 0:
        return Places(0, [])
    found = gpus()
    if wanted == "auto":
        wanted = len(found) * spec.per_gpu if found else len(os.sched_getaffinity(0))
    return Places(wanted, found)


@dataclass
class Crew:
    """The workers of this machine."""

    spec_path: Path
    places: Places
    log: Path
    """Where workers write what belongs to no run."""
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    _deaths: dict[int, int] = field(default_factory=dict)
    _done: set[int] = field(default_factory=set)
    _ended: int = 0

    def start(self, most: int) -> None:
        """Start the workers, but no more than ``most``."""
        for index in range(min(self.places.jobs, most)):
            self._start(index)

    def _start(self, index: int) -> None:
        command = [sys.executable, "-m", "salient_ds.cli", "sweep", str(self.spec_path), "--worker"]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as out:
            self.processes[index] = self._open(command, index, out)

    def _open(self, command: list[str], index: int, out: IO[bytes]) -> subprocess.Popen[bytes]:
        # a session of its own: Ctrl-C reaches the leading process alone, which then asks its workers to stop
        return subprocess.Popen(
            command, env=self.places.environment(index), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip

    def look(self, ended: int) -> bool:
        """Replace workers that died. Returns whether any worker is left, or none was needed.

        Args:
            ended: runs of the sweep that have ended. When it grows, deaths are forgiven.
        """
        if ended > self._ended:
            self._ended, self._deaths = ended, {}
        for index, process in list(self.processes.items()):
            status = process.poll()
            if status is None or index in self._done:
                continue
            self._deaths[index] = self._deaths.get(index, 0) + 1
            if status == 0 or self._deaths[index] > RESTARTS:
                self._done.add(index)
            else:
                self._start(index)
        return not self.processes or len(self._done) < len(self.processes)

    def stop(self) -> None:
        """Ask all workers to save and end. Those that do not within :data:`GRACE` seconds are killed."""
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        until = time.monotonic() + GRACE
        for process in self.processes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """End all workers at once."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()

    def log_tail(self, lines: int = 5) -> list[str]:
        """The last lines that workers wrote outside of runs."""
        try:
            return [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()][-lines:]
        except OSError:
            return []
