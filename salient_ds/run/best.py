"""The best evaluation of a run so far, and when to stop waiting for a better one."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

from salient_ds.config.run import RunConfig
from salient_ds.run.evaluating import Outcome


@dataclass
class Best:
    """Follows ``train.best_metric``. Equal on all processes, and part of checkpoints."""

    metric: str
    """Name among :attr:`Outcome.values`."""
    lower: bool
    """Whether a smaller value is better."""
    patience: int | None = None
    value: float | None = None
    step: int | None = None
    """Step of the best evaluation; a checkpoint of it is kept."""
    since: int = 0
    """Evaluations after it."""

    @property
    def exhausted(self) -> bool:
        """Whether to stop waiting."""
        return self.patience is not None and self.since >= self.patience

    def take(self, outcome: Outcome, step: int) -> bool:
        """Note an evaluation. Returns whether it is the best one so far. A value that is not finite never is."""
        new = outcome.values.get(self.metric)
        if new is not None and isfinite(new) and (self.value is None or self._better(new, self.value)):
            self.value, self.step, self.since = new, step, 0
            return True
        self.since += 1
        return False

    def _better(self, new: float, old: float) -> bool:
        return new < old if self.lower else new > old

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"metric": self.metric, "value": self.value, "step": self.step, "since": self.since}

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from :meth:`state`; from the beginning if that was of another metric."""
        if state is not None and state["metric"] == self.metric:
            self.value, self.step, self.since = state["value"], state["step"], state["since"]

    def text(self) -> str:
        """For people and logs."""
        return f"best {self.metric} {self.value:.4f}, step {self.step}" if self.value is not None else "no best yet"


def best_of(run: RunConfig) -> Best | None:
    """What a run follows; None if it takes the last step as it is."""
    wanted, task = run.train.best_metric, run.data.task
    if wanted is None:
        return None
    if wanted == "auto":
        assert task is not None, "the configuration was checked"
        wanted = task.main_metric
    lower = wanted == "loss" or (task is not None and task.fitting_metrics[wanted].lower_is_better)
    return Best(wanted, lower, run.train.patience)
