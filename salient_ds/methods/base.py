"""What a rank-allocation method is: the types that pass between the pure maths and the engine.

Shape legend: M = adapted matrices, R = initial rank of one matrix, N = sum of all R, n = elements held locally,
T = window length.  Rows are singular values in module-major order: matrix k owns rows offset(k) .. offset(k) + R_k.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from salient_ds.salience.budget import Event
from salient_ds.salience.influence import Share


@dataclass(frozen=True)
class RankLayout:
    """Adapted matrices in the order in which they were injected, the same on every process."""

    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    in_features: tuple[int, ...]
    out_features: tuple[int, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First row of every matrix, and N at the end (M + 1 numbers)."""
        out = [0]
        for rank in self.ranks:
            out.append(out[-1] + rank)
        return tuple(out)

    @property
    def total(self) -> int:
        """N, the number of singular values at the start."""
        return self.offsets[-1]

    @cached_property
    def module_of_row_N(self) -> Tensor:
        """Index of the matrix that each row belongs to (int64, CPU)."""
        return torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))


@dataclass(frozen=True)
class RankDecision:
    """Which of the N rows live after an event. The same value on every process, checked through :meth:`digest`."""

    step: int
    budget: int
    mask_N: Tensor
    """bool, CPU; True = kept."""
    threshold: float = float("nan")
    """The score at the cut, for the log."""
    hold: bool = True
    """Zero the dropped rows again after every later optimizer step (False: they may grow back, as in AdaLoRA)."""

    def digest(self) -> str:
        """SHA-256 over step, budget, hold and mask."""
        head = f"{self.step}:{self.budget}:{self.hold}:".encode()
        return hashlib.sha256(head + self.mask_N.to(torch.uint8).numpy().tobytes()).hexdigest()

    def ranks(self, layout: RankLayout) -> list[int]:
        """Live rank of every matrix (M numbers)."""
        return [int(part.sum()) for part in self.mask_N.split(list(layout.ranks))]

    @property
    def total(self) -> int:
        """Number of live rows."""
        return int(self.mask_N.sum())


@dataclass(frozen=True)
class MaskPolicy:
    """How a decision acts on parameters and optimizer state. Declared by the method, applied by the engine."""

    gate_forward: bool
    """Multiply E by the mask in forward: no gradient reaches a pruned row, nothing can come back by itself."""
    zero_vectors: bool
    """Zero the rows of A and columns of B as well, and take them out of the orthogonality penalty."""
    zero_moments: bool
    """Zero both Adam moments of everything that is zeroed."""
    delay: int = 0
    """Optimizer steps between the event and the moment when the decision takes effect (0 or 1)."""
    start_rank: int | None = None
    """Rows of every matrix that live before the first event; None: all."""
    start_sigma: float | None = None
    """Value that E of a row gets when an event switches it on; None: it stays what it is."""


@dataclass(frozen=True)
class Part:
    """A contiguous piece of one factor's fp32 master that this process owns (flattened, row-major)."""

    factor: str
    """"A", "E", "B", ... as in :meth:`salient_ds.adapters.ranked_linear.RankedLinear.factors`."""
    module: int
    lo: int
    """First element inside the flattened factor."""
    numel: int
    shape: tuple[int, ...]
    rank_axis: int | None
    """Axis of the ranks; None for factors that all ranks share (LoRA^2's outer ones)."""


class StepView(Protocol):
    """Local slices of the fp32 masters right after the optimizer changed them, before any copy or all-gather.

    One view covers one flat buffer of the optimizer; a step shows every view of this process exactly once.
    """

    key: str
    """Stable name of this view on this process."""
    parts: tuple[Part, ...]

    def value(self, part: Part) -> Tensor:
        """fp32 master values of ``part`` (numel,); a live slice, do not keep it without cloning."""
        ...

    def grad(self, part: Part) -> Tensor:
        """The gradient the step used: averaged, unscaled, clipped (numel,)."""
        ...

    def sigma(self) -> tuple[Tensor, Tensor]:
        """All singular values of the view at once: global row indices (n,) int64 and fp32 values (n,)."""
        ...


def initial_decision(policy: MaskPolicy, layout: RankLayout) -> RankDecision:
    """What is in force before the first event: all rows, or the first ``start_rank`` of every matrix."""
    if policy.start_rank is None:
        return RankDecision(0, layout.total, torch.ones(layout.total, dtype=torch.bool))
    mask_N = torch.cat([torch.arange(rank) < policy.start_rank for rank in layout.ranks])
    return RankDecision(0, int(mask_N.sum()), mask_N, hold=False)


ReadShard = Callable[[str, Part], Tensor]
"""``read(stat, part)`` returns the saved statistic for exactly the elements of ``part``, shape (..., numel)."""


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

    share: Share | None
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
