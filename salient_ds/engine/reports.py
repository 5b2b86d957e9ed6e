"""What passes between the training loop and the engine: batches in, reports out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from salient_ds.ranks import Event, RankDecision


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: model inputs on the device, and how many targets its mean loss averages over."""

    inputs: dict[str, Tensor]
    num_targets: int
    indices: tuple[int, ...]
    """Rows of the training data, named when the loss is not finite."""


@dataclass(frozen=True)
class EventReport:
    """An allocation that took place, and where its time went (seconds)."""

    decision: RankDecision
    event: Event
    gather: float
    solve: float
    apply: float
    changed: int
    """Rows switched on or off."""
    ranks: tuple[int, ...]
    """Live rank of every matrix."""
    kept_N: Tensor
    """Rows of the initial layout that live now (bool, CPU); the decision's own mask is over the rows there were, fewer
    after a compaction or where room is made in flight."""
    growth: float | None = None
    """Seconds it took to make room for new rows before; None: there was room."""


@dataclass
class StepReport:
    loss: float
    """Mean task loss over the targets of the global batch, without the orthogonality penalty."""
    skipped: bool
    """No update: non-finite gradients. Statistics and schedule did not move."""
    norm_value: Tensor | float | None = None
    penalty_value: Tensor | None = None
    event: EventReport | None = None
    compaction: float | None = None
    """Seconds it took to drop pruned rows after this step; None: nothing was dropped."""

    # Read only when somebody wants them: reading waits for the device, which then has nothing to do.
    @property
    def grad_norm(self) -> float:
        """Norm of the gradient before clipping."""
        return float("nan") if self.norm_value is None else float(self.norm_value)

    @property
    def penalty(self) -> float | None:
        """The orthogonality penalty of the step, coefficient included."""
        return None if self.penalty_value is None else float(self.penalty_value)


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; raised on every process before the step was taken."""

    def __init__(self, step: int, indices: list[int]) -> None:
        self.step, self.indices = step, indices
        super().__init__(f"the loss of step {step} is not finite; rows of the training data: {indices}")
