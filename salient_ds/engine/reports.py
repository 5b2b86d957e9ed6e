"""What the training loop and the engine exchange: batches in, reports out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from salient_ds.ranks import Event, RankDecision
from salient_ds.strict import Reported


@dataclass(frozen=True)
class MicroBatch:
    """The data of one forward pass: model inputs on the device, and the number of targets its loss averages over."""

    inputs: dict[str, Tensor]
    num_targets: int
    indices: tuple[int, ...]
    """Row numbers in the training data. The error names them if the loss is not finite."""
    segments: tuple[int, ...] | None = None
    """Tokens of every packed example; None: one example per row of the batch."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens (padding included) of every sequence of which attention sees nothing else."""
        if self.segments is not None:
            return self.segments
        rows, size = self.inputs["input_ids"].shape
        return (size,) * rows


@dataclass(frozen=True)
class EventReport:
    """An allocation event that took place, and how long its parts took."""

    decision: RankDecision
    event: Event
    gather: float
    """Seconds to combine the statistics of all processes (with HeteroLoRA, probes included)."""
    solve: float
    """Seconds to decide, and to compare the decisions of all processes."""
    apply: float
    """Seconds to apply the decision."""
    changed: int
    """Number of rows switched on or off."""
    ranks: tuple[int, ...]
    """Live rank of every matrix."""
    kept_N: Tensor
    """Rows of the initial layout that live now (bool, CPU). The decision's own mask covers only the rows that existed
    at the event, which are fewer after a compaction or while rows are added in flight."""
    growth: float | None = None
    """Seconds it took to make room for new rows before the event; None if there was enough room."""


@dataclass
class StepReport:
    """What one call of :meth:`AllocatingEngine.train_step` did."""

    loss: float
    """Mean task loss over the targets of the global batch, without the orthogonality penalty."""
    skipped: bool
    """Nothing was updated, because gradients were not finite. Statistics and schedule did not advance."""
    norm_value: Tensor | float | None = None
    penalty_value: Tensor | None = None
    event: EventReport | None = None
    compaction: float | None = None
    """Seconds it took to drop pruned rows after this step; None if nothing was dropped."""
    raised: frozenset[str] = frozenset()
    """Names of the engine's flags that at least one process raised in this step. Equal on all processes."""

    # Become numbers only on access, because reading a value waits for the device and then leaves it idle.
    @property
    def grad_norm(self) -> float:
        """Norm of the gradient before clipping."""
        return float("nan") if self.norm_value is None else float(self.norm_value)

    @property
    def penalty(self) -> float | None:
        """The orthogonality penalty of the step, coefficient included."""
        return None if self.penalty_value is None else float(self.penalty_value)


class NonFiniteLoss(RuntimeError, Reported):
    """The loss is NaN or infinite. Raised on every process, before the step is taken."""

    def __init__(self, step: int, indices: list[int]) -> None:
        self.step, self.indices = step, indices
        super().__init__(f"the loss of step {step} is not finite; rows of the training data: {indices}")


class Diverged(ValueError):
    """A run cannot go on because its numbers are not finite. The message says how a user can continue."""
