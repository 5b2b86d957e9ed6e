"""Which runs a sweep needs, given those that have ended. Pure: every process that asks with the same outcomes gets the
same answer, so nobody has to hand out work.

An arm goes through its phases by itself: tune (its learning rates on the tuning seeds), widen (further learning rates,
while the best one lies at an edge), fresh (the best one on fresh seeds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from salient_ds.sweep.spec import SweepSpec, lr_text

Phase = Literal["tune", "widen", "fresh"]
Status = Literal["finished", "stopped", "diverged", "failed"]
Edge = Literal["interior", "low edge", "high edge", "one rate", "unknown"]


@dataclass(frozen=True)
class Job:
    """One run: an arm at a learning rate on a seed."""

    arm: str
    lr: float
    seed: int
    phase: Phase

    @property
    def key(self) -> str:
        """Name of the run in the queue, the same in every phase."""
        return f"{self.arm}~lr-{lr_text(self.lr)}~seed-{self.seed}"


@dataclass(frozen=True)
class Outcome:
    """How a run ended. JSON by :meth:`to_json`."""

    arm: str
    lr: float
    seed: int
    phase: Phase
    status: Status
    """stopped: its loss was hopeless early. diverged: its numbers were not finite. failed: an error."""
    reason: str = ""
    """Why it did not finish, in a sentence."""
    steps: int | None = None
    train_loss: float | None = None
    """Smoothed training loss at the end."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Held-out numbers after the last step, without the prefix ``eval_``."""
    trainable: int | None = None
    """Trainable adapter parameters (elements) at the end, with the ranks that are live then."""
    total_rank: int | None = None
    seconds: float | None = None
    """Wall time of the last start of the run, loading and evaluation included."""
    start_step: int = 0
    """The step from which the last start continued."""
    peak_allocated: int | None = None
    """Bytes on the GPU; None on CPU."""
    peak_reserved: int | None = None
    host: str = ""
    version: str = ""

    @property
    def key(self) -> str:
        return Job(self.arm, self.lr, self.seed, self.phase).key

    def score(self, spec: SweepSpec) -> float:
        """What tuning minimises; infinite for a run that did not finish."""
        value = self.metrics.get(spec.metric.name, math.nan)
        return spec.metric.sign * value if self.status == "finished" and math.isfinite(value) else math.inf

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become None, which JSON has."""
        plain = dict(vars(self)) | {"metrics": {name: _finite(value) for name, value in self.metrics.items()}}
        return plain | {"train_loss": _finite(self.train_loss)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Outcome:
        """The outcome of :meth:`to_json`.

        Raises:
            TypeError: keys are missing or unknown, as in a file of another version.
        """
        metrics = {name: math.nan if value is None else float(value) for name, value in data["metrics"].items()}
        return cls(**{**data, "metrics": metrics})


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


@dataclass(frozen=True)
class ArmPlan:
    """Where an arm stands."""

    arm: str
    jobs: list[Job]
    """All its runs that are known so far, ended or not, in the order in which they should start."""
    scores: dict[float, float | None]
    """Learning rate -> score on the tuning seeds, ascending; None: not known yet."""
    chosen: float | None
    """The best learning rate, once every score is known; None also if no run finished."""
    edge: Edge
    complete: bool
    """No further run will be added to ``jobs``."""


def plan_arm(spec: SweepSpec, arm: str, outcomes: Mapping[str, Outcome]) -> ArmPlan:
    """The plan of one arm.

    Args:
        outcomes: by key of the run; those of other arms are not looked at.
    """
    first = spec.rates(arm)
    grid, added = list(first), {"low": 0, "high": 0}
    jobs = [Job(arm, lr, seed, "tune") for lr in _middle_first(first) for seed in spec.seeds.tune]
    while True:
        scores = {lr: _score(spec, arm, lr, outcomes) for lr in grid}
        if any(score is None for score in scores.values()):
            return ArmPlan(arm, jobs, scores, None, "unknown", False)
        side = _edge_side(spec, arm, grid, scores, outcomes)
        if side is None or len(first) < 2 or added[side] >= spec.widen:
            break
        lr = _beyond(grid, side)
        grid = sorted([*grid, lr])
        added[side] += 1
        jobs += [Job(arm, lr, seed, "widen") for seed in spec.seeds.tune]
    chosen = min(grid, key=lambda lr: (scores[lr], lr))
    if not math.isfinite(scores[chosen] or 0.0):
        return ArmPlan(arm, jobs, scores, None, "unknown", True)
    edge: Edge = "one rate" if len(grid) < 2 else "interior" if side is None else f"{side} edge"  # type: ignore[assignment]
    jobs += [Job(arm, chosen, seed, "fresh") for seed in spec.seeds.fresh]
    return ArmPlan(arm, jobs, scores, chosen, edge, True)


def _score(spec: SweepSpec, arm: str, lr: float, outcomes: Mapping[str, Outcome]) -> float | None:
    """Mean score over the tuning seeds; None if one of them has not ended."""
    found = [outcomes.get(Job(arm, lr, seed, "tune").key) for seed in spec.seeds.tune]
    known = [outcome.score(spec) for outcome in found if outcome is not None]
    return sum(known) / len(known) if len(known) == len(found) else None


def _edge_side(
    spec: SweepSpec,
    arm: str,
    grid: Sequence[float],
    scores: Mapping[float, float | None],
    outcomes: Mapping[str, Outcome],
) -> Literal["low", "high"] | None:
    """At which edge of the grid the best learning rate lies; None: at neither.

    If every run diverged, lower rates are worth a try. If all failed for other reasons, no rate is.
    """
    best = min(grid, key=lambda lr: (scores[lr], lr))
    if not math.isfinite(scores[best] or 0.0):
        ends = [outcomes[Job(arm, lr, seed, "tune").key].status for lr in grid for seed in spec.seeds.tune]
        return "low" if all(status in ("diverged", "stopped") for status in ends) else None
    if len(grid) < 2:
        return None
    return "low" if best == grid[0] else "high" if best == grid[-1] else None


def _beyond(grid: Sequence[float], side: Literal["low", "high"]) -> float:
    """The next learning rate outside of an ascending grid, at the ratio of its two outermost ones, to 3 digits."""
    near, far = (grid[0], grid[1]) if side == "low" else (grid[-1], grid[-2])
    return float(f"{near * near / far:.3g}")


def _middle_first(rates: Sequence[float]) -> list[float]:
    """Ascending rates, those in the middle first: they give the others something to be compared with early."""
    middle = (len(rates) - 1) / 2
    return [rate for _, rate in sorted(enumerate(rates), key=lambda pair: (abs(pair[0] - middle), pair[0]))]


def plan(spec: SweepSpec, outcomes: Mapping[str, Outcome]) -> dict[str, ArmPlan]:
    """Arm -> its plan."""
    return {arm: plan_arm(spec, arm, outcomes) for arm in spec.arms}


def waiting(plans: Mapping[str, ArmPlan], outcomes: Mapping[str, Outcome]) -> list[Job]:
    """Runs that have not ended, tuning ones first, arms taking turns."""
    queues = [[job for job in plan.jobs if job.key not in outcomes] for plan in plans.values()]
    turns = [(job.phase == "fresh", place, job) for queue in queues for place, job in enumerate(queue)]
    return [job for _, _, job in sorted(turns, key=lambda item: item[:2])]


def expected_runs(spec: SweepSpec, plans: Mapping[str, ArmPlan]) -> int:
    """Runs of the whole sweep, as far as they are known: those that ``widen`` may add come on top."""
    open_arms = [plan for plan in plans.values() if not plan.complete]
    return sum(len(plan.jobs) for plan in plans.values()) + len(spec.seeds.fresh) * len(open_arms)
