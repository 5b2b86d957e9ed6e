"""What a rank-allocation method is: its duties to the engine. Importing this file loads no torch.

Shape legend: M = adapted matrices, N = rows (:mod:`salient_ds.ranks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from salient_ds.ranks import Event, MaskPolicy, Part, RankDecision, RankLayout, ReadShard, StepView, WorkShare

if TYPE_CHECKING:
    from torch import Tensor


class Method(Protocol):
    """A rank-allocation method. Holds statistics of the local shards; never communicates."""

    name: str
    policy: MaskPolicy
    events: Sequence[Event]
    """All events of the run, known before it starts (empty for fixed-rank methods)."""
    needs_penalty: bool
    """Whether the orthogonality norms must be measured even if their coefficient is 0."""
    needs_before: bool
    """Whether :meth:`before` is to be called at all."""

    def attach(self, layout: RankLayout, views: Sequence[StepView]) -> None:
        """Called once before training with the static views that ``observe`` will be given."""
        ...

    def before(self, view: StepView, step: int) -> None:
        """As :meth:`observe`, but just before the optimizer changes the masters; the gradient is already final."""
        ...

    def observe(self, view: StepView, step: int) -> None:
        """Called inside optimizer step ``step`` (1-based, applied steps only) for every local view."""
        ...

    def end_step(self, step: int, penalty_M2: Tensor | None) -> None:
        """After step ``step``; ``penalty_M2`` holds ||A A^T - I||_F and ||B^T B - I||_F per matrix at that step."""
        ...

    def contribution(self) -> dict[str, Tensor]:
        """Full-size tensors that hold this process' part and zeros elsewhere: their sum over processes is global."""
        ...

    def allocate(self, statistics: dict[str, Tensor], event: Event, previous: RankDecision) -> RankDecision:
        """Pure decision from summed contributions; called with identical arguments on every process."""
        ...

    def local_state(self) -> Iterator[tuple[str, Part, Tensor]]:
        """(statistic, part, tensor (..., numel)) triples to be checkpointed by whoever owns the part."""
        ...

    def shared_state(self) -> dict[str, Any]:
        """State that is equal on every process (tensors, numbers)."""
        ...

    def load_state(self, shared: dict[str, Any], read: ReadShard) -> None:
        """Restore after :meth:`attach`, possibly with another sharding than the one that was saved."""
        ...


@runtime_checkable
class SharingMethod(Protocol):
    """A method whose :meth:`Method.allocate` divides its work over processes, all of which call it alike."""

    share: WorkShare | None
    """None: each process does all of it."""


@runtime_checkable
class ScoringMethod(Protocol):
    """Further duties of a method that needs scores of whole matrices (adapters/module_score.py)."""

    exact_scores: bool
    """Gradients are averaged over processes before their absolute value is taken, instead of the scores."""

    def choose_reduction(self, accumulation: int) -> None:
        """Settle ``exact_scores`` for steps of so many micro-batches on a process.

        Raises:
            ValueError: what was asked for is not possible with them.
        """
        ...

    def scored_at(self, step: int) -> bool:
        """Whether the backward passes of ``step`` are to be scored."""
        ...

    def take_scores(self, score_M: Tensor, step: int) -> None:
        """Scores of an applied step, before :meth:`Method.end_step`; the same on every process."""
        ...


@runtime_checkable
class ResizableMethod(Protocol):
    """A method that can go on with other rows; its options say so by ``compactable`` or ``grows``."""

    def resized(self, layout: RankLayout) -> None:
        """Pruned rows are gone, or there is room for new ones: from now on rows are numbered by ``layout``."""
        ...


@runtime_checkable
class GrowingMethod(Protocol):
    """A method whose events may need rows that are not there yet, the first ones of every matrix at any time."""

    def room_for(self, event: Event, previous: RankDecision) -> tuple[int, ...] | None:
        """Rows that every matrix is to have before ``event`` is decided; None: those that it has. Pure."""
        ...


@runtime_checkable
class ReportingMethod(Protocol):
    """A method with results of its own to leave in the run directory."""

    def write_results(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Called once on the main process after the last step.

        Args:
            folder: the run directory.
            run: the run file as it was given, a mapping of sections.
        """
        ...
