"""The duties of a rank-allocation method: what the engine calls. Importing this file loads no torch.

Shape legend: M = adapted matrices, N = rows (:mod:`salient_ds.ranks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from salient_ds.ranks import Event, MaskPolicy, Part, RankDecision, RankLayout, ReadShard, Spectrum, StepView, WorkShare

if TYPE_CHECKING:
    from torch import Tensor


class Method(Protocol):
    """A rank-allocation method. It keeps statistics of the local shards, and never communicates."""

    name: str
    policy: MaskPolicy
    events: Sequence[Event]
    """All events of the run, known before it starts (empty for fixed-rank methods)."""
    needs_penalty: bool
    """Whether the orthogonality norms must be measured even if their coefficient is 0."""
    needs_before: bool
    """Whether the engine has to call :meth:`before`."""

    def attach(self, layout: RankLayout, views: Sequence[StepView]) -> None:
        """Receive the views that ``observe`` will be given.

        Called before training, and again when rows have been dropped or added. Without views, the method must let go of
        the old ones.
        """
        ...

    def before(self, view: StepView, step: int) -> None:
        """As :meth:`observe`, but just before the optimizer changes the masters. The gradient is already final."""
        ...

    def observe(self, view: StepView, step: int) -> None:
        """Called for every local view inside optimizer step ``step`` (counted from 1, applied steps only)."""
        ...

    def end_step(self, step: int, penalty_M2: Tensor | None) -> None:
        """Called after step ``step``.

        ``penalty_M2`` holds ||A A^T - I||_F and ||B^T B - I||_F of every matrix at that step; None if they were not
        measured.
        """
        ...

    def contribution(self) -> dict[str, Tensor]:
        """Full-size tensors with this process's part and zeros elsewhere. The engine sums them over processes."""
        ...

    def allocate(self, statistics: dict[str, Tensor], event: Event, previous: RankDecision) -> RankDecision:
        """Decide from the summed contributions.

        Called with identical arguments on every process, and has to return the same decision on all of them.
        """
        ...

    def local_state(self) -> Iterator[tuple[str, Part, Tensor]]:
        """(statistic, part, tensor (..., numel)) triples. The process that owns a part saves it in the checkpoint."""
        ...

    def shared_state(self) -> dict[str, Any]:
        """State that is equal on every process (tensors, numbers)."""
        ...

    def load_state(self, shared: dict[str, Any], read: ReadShard) -> None:
        """Restore the state after :meth:`attach`. The sharding may differ from the one that was saved."""
        ...


@runtime_checkable
class SharingMethod(Protocol):
    """A method whose :meth:`Method.allocate` divides its work over processes. All of them call it alike."""

    share: WorkShare | None
    """This process's share; None: each process does all of the work."""


@runtime_checkable
class FusingMethod(Protocol):
    """A method whose statistics have a kernel of their own."""

    fused: bool
    """Whether to use it on CUDA devices. Set after the method was built."""


@runtime_checkable
class ScoringMethod(Protocol):
    """Additional duties of a method that needs scores of whole matrices (adapters/module_score.py)."""

    exact_scores: bool
    """True: gradients are averaged over processes before their absolute value is taken. False: scores are averaged."""

    def choose_reduction(self, accumulation: int) -> None:
        """Set ``exact_scores``, given that a step has ``accumulation`` micro-batches on a process.

        Raises:
            ValueError: what the options ask for is not possible with that many micro-batches.
        """
        ...

    def scored_at(self, step: int) -> bool:
        """Whether to score the backward passes of ``step``."""
        ...

    def take_scores(self, score_M: Tensor, step: int) -> None:
        """Receive the scores of an applied step, equal on every process. Called before :meth:`Method.end_step`."""
        ...


@runtime_checkable
class RotatingMethod(Protocol):
    """A method whose adapters B A are rotated into their singular bases before some events."""

    def rotates_at(self, event: Event) -> bool:
        """Whether to rotate before ``event`` is decided."""
        ...

    def take_spectrum(self, spectrum: Spectrum) -> None:
        """Receive what the rotation found, equal on every process. Called before :meth:`Method.contribution`."""
        ...


@runtime_checkable
class SummingMethod(Protocol):
    """A method that needs sums over all processes not only at events, but after some steps too."""

    def sums_at(self, step: int) -> bool:
        """Whether this step is one of them. The same on every process."""
        ...

    def step_contribution(self) -> dict[str, Tensor]:
        """Full-size tensors with this process's part of the step and zeros elsewhere."""
        ...

    def take_sums(self, sums: dict[str, Tensor], step: int) -> None:
        """Receive the sums over all processes. Called before :meth:`Method.end_step`."""
        ...


@runtime_checkable
class ResizableMethod(Protocol):
    """A method that can continue with other rows. Its options declare that by ``compactable`` or ``grows``."""

    def resized(self, layout: RankLayout) -> None:
        """Pruned rows have been dropped, or new rows allocated. From now on, ``layout`` numbers the rows."""
        ...


@runtime_checkable
class GrowingMethod(Protocol):
    """A method whose events may need rows that are not allocated yet.

    At any time, the first rows of every matrix are allocated.
    """

    def room_for(self, event: Event, previous: RankDecision) -> tuple[int, ...] | None:
        """Rows that every matrix needs before ``event`` is decided; None: the allocated ones suffice. Pure."""
        ...


@runtime_checkable
class ReportingMethod(Protocol):
    """A method that writes results of its own to the run directory."""

    def write_results(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Called once on the main process after the last step.

        Args:
            folder: the run directory.
            run: the run file as it was given, as a mapping of sections.
        """
        ...
