"""Early stops: a run whose training loss is far above that of another learning rate of its arm need not go on.

Every tuning run leaves its mean training loss at a few marks, for example at 25, 50 and 75 % of its steps. At each mark
it compares itself with the lowest loss that a run of the same arm and seed has left there. Which hopeless run ends
where therefore depends on the order of the runs. A run that ends best of its arm is stopped only if its loss was
``stop.factor`` times another's on the way.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections import deque
from pathlib import Path

from salient_ds.sweep.folder import write_whole
from salient_ds.sweep.plan import Job
from salient_ds.sweep.spec import Stop


class HopelessRun(Exception):
    """A run that should not go on. The message says why."""


def mark_steps(total_steps: int, after: float) -> list[int]:
    """Steps (from 1) at which runs are compared: every ``after`` of the run, without its end."""
    count = math.ceil(1 / after - 1e-9) - 1
    steps = {math.ceil(total_steps * after * (i + 1) - 1e-9) for i in range(count)}
    return sorted(step for step in steps if 0 < step < total_steps)


def window(total_steps: int, after: float) -> int:
    """Steps over which the loss at a mark is averaged: half of those before the first mark."""
    return max(1, math.ceil(total_steps * after / 2))


def verdict(loss: float, others: dict[str, float], factor: float) -> str | None:
    """Why a run with this loss is hopeless; None if it is not.

    Args:
        others: learning rate (as text) -> loss at the same mark.
    """
    if not math.isfinite(loss):
        return "its training loss is not finite"
    known = {lr: other for lr, other in others.items() if math.isfinite(other)}
    if not known:
        return None
    best = min(known, key=lambda lr: known[lr])
    if known[best] > 0 and loss > factor * known[best]:
        return f"training loss {loss:.4g} is above {factor:g} x {known[best]:.4g}, that of lr {best} at the same step"
    return None


class Watch:
    """Follows the training loss of one tuning run."""

    def __init__(self, folder: Path, job: Job, stop: Stop, total_steps: int) -> None:
        """
        Args:
            folder: where all runs of the sweep leave their marks.
        """
        self.folder, self.job, self.stop = folder, job, stop
        self._marks = set(mark_steps(total_steps, stop.after))
        self._losses: deque[float] = deque(maxlen=window(total_steps, stop.after))

    def look(self, step: int, loss: float) -> None:
        """Take the loss of an applied step; at a mark, record it and compare.

        A run that was resumed just before a mark has seen too few steps, and passes that mark unseen.

        Raises:
            HopelessRun: the run should not go on.
        """
        self._losses.append(loss)
        if step not in self._marks or len(self._losses) < (self._losses.maxlen or 1):
            return
        mean = sum(self._losses) / len(self._losses)
        reason = verdict(mean, self._others(step), self.stop.factor)
        if math.isfinite(mean):
            write_whole(self._path(step), json.dumps({"lr": self.job.lr, "loss": mean}) + "\n")
        if reason is not None:
            raise HopelessRun(f"step {step}: {reason}")

    def _path(self, step: int) -> Path:
        return self.folder / f"{self.job.key}~step-{step}.json"

    def _others(self, step: int) -> dict[str, float]:
        mine, found = self._path(step).name, {}
        for path in self.folder.glob(f"{self.job.arm}~lr-*~seed-{self.job.seed}~step-{step}.json"):
            if path.name == mine:
                continue
            with contextlib.suppress(OSError, ValueError, KeyError):  # damaged: as if it were not there
                row = json.loads(path.read_text())
                found[f"{row['lr']:g}"] = float(row["loss"])
        return found
