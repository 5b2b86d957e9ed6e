"""Types exchanged between the maths of a method and the training engine. Importing this file loads no torch.

Shape legend: M = adapted matrices, R = rows of one matrix, N = sum of all R, n = elements held by this process.
A *row* is one singular value with its two vectors. Rows are numbered matrix after matrix: matrix k owns rows
``offsets[k]`` to ``offsets[k + 1]``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Event:
    """One allocation, right after ``step``: from then on, ``total_rank`` rows may be live."""

    step: int
    """Applied optimizer step after which it happens, counted from 1; 0: before the first step (HeteroLoRA)."""
    total_rank: int
    """Budget: the allowed sum of ranks from here on."""
    window_start: int
    """First step that the method looks at."""
    window: int
    """Steps that the method looks at, from ``window_start`` on. The last one is usually ``step``."""


@dataclass(frozen=True)
class RankLayout:
    """The adapted matrices in the order of the model, the same on every process."""

    modules: tuple[str, ...]
    ranks: tuple[int, ...]
    in_features: tuple[int, ...]
    out_features: tuple[int, ...]

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """First row of every matrix, followed by N (M + 1 numbers)."""
        out = [0]
        for rank in self.ranks:
            out.append(out[-1] + rank)
        return tuple(out)

    @property
    def total(self) -> int:
        """N, the number of rows."""
        return self.offsets[-1]

    @cached_property
    def module_of_row_N(self) -> Tensor:
        """Index of the matrix that each row belongs to (int64, CPU)."""
        import torch

        return torch.repeat_interleave(torch.arange(len(self.ranks)), torch.tensor(self.ranks))


@dataclass(frozen=True)
class RankDecision:
    """Which of the N rows are live after an event. Equal on every process, which :meth:`digest` allows to check."""

    step: int
    budget: int
    mask_N: Tensor
    """bool, CPU; True = kept."""
    threshold: float = float("nan")
    """The score at the cut, for the log."""
    hold: bool = True
    """Zero the dropped singular values again after every later optimizer step. False: they may grow back (AdaLoRA)."""

    def digest(self) -> str:
        """SHA-256 over step, budget, hold and mask."""
        head = f"{self.step}:{self.budget}:{self.hold}:".encode()
        return hashlib.sha256(head + self.mask_N.byte().numpy().tobytes()).hexdigest()

    def ranks(self, layout: RankLayout) -> list[int]:
        """Live rank of every matrix (M numbers)."""
        return [int(part.sum()) for part in self.mask_N.split(list(layout.ranks))]

    @property
    def total(self) -> int:
        """Number of live rows."""
        return int(self.mask_N.sum())


@dataclass(frozen=True)
class MaskPolicy:
    """How a decision acts on parameters and optimizer state. The method declares it, the engine applies it."""

    gate_forward: bool
    """Multiply E by the mask in the forward pass, and take pruned rows out of the orthogonality penalty. So no gradient
    reaches a pruned row, and it cannot come back by itself."""
    zero_vectors: bool
    """Also zero the rows of A and columns of B that belong to pruned rows."""
    zero_moments: bool
    """Zero both Adam moments of everything that is zeroed."""
    delay: int = 0
    """Optimizer steps from the event until the decision takes effect (0 or 1)."""
    start_rank: int | None = None
    """Live rows of every matrix before the first event; None: all."""
    start_sigma: float | None = None
    """Singular value that a row gets when an event activates it; None: it keeps its value."""


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
    """Axis of the ranks; None for factors that all ranks share (the outer factors of LoRA^2)."""


class StepView(Protocol):
    """Local slices of the fp32 masters right after the optimizer changed them, before any copy or all-gather.

    One view covers one flat buffer of the optimizer. In a step, the method sees every view of its process exactly once.
    """

    key: str
    """Stable name of this view on this process."""
    parts: tuple[Part, ...]

    def value(self, part: Part) -> Tensor:
        """fp32 master values of ``part`` (numel,). This is a live slice: clone it if you keep it."""
        ...

    def grad(self, part: Part) -> Tensor:
        """The gradient that the step used: averaged, unscaled, clipped (numel,)."""
        ...

    def sigma(self) -> tuple[Tensor, Tensor]:
        """All singular values of the view at once: global row indices (n,) int64 and fp32 values (n,)."""
        ...

    def sigma_grad(self) -> Tensor:
        """The gradients of :meth:`sigma`'s values that the step used (n,)."""
        ...


@runtime_checkable
class JoiningView(StepView, Protocol):
    """A view that shows parts which lie side by side as one tensor: one kernel then does the work of many."""

    def spans(self, parts: Sequence[Part]) -> list[tuple[Part, ...]]:
        """``parts`` in the order in which they lie, neighbours together."""
        ...

    def span_value(self, span: tuple[Part, ...]) -> Tensor:
        """The values of all parts of a span, as :meth:`StepView.value`."""
        ...

    def span_grad(self, span: tuple[Part, ...]) -> Tensor:
        """Their gradients, as :meth:`StepView.grad`."""
        ...

    def span_moments(self, span: tuple[Part, ...]) -> dict[str, Tensor]:
        """Their optimizer state, as :meth:`AdamView.moments`."""
        ...


@dataclass(frozen=True)
class AdamSettings:
    """Adam's settings in one step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    """Decoupled weight decay (AdamW). False: the decay is part of the gradient."""


class AdamView(StepView, Protocol):
    """A :class:`StepView` that also gives access to the optimizer state."""

    def moments(self, part: Part) -> dict[str, Tensor]:
        """Live slices of the optimizer's state for ``part`` by name ("exp_avg", ...); empty before the first step."""
        ...

    def settings(self, part: Part) -> AdamSettings:
        """The settings that the optimizer uses for ``part``. Only valid inside its step."""
        ...


@dataclass(frozen=True)
class WorkShare:
    """Which part of a divided computation this process does, and how the parts are combined."""

    global_rank: int = 0
    world_size: int = 1
    combine: Callable[[Tensor], None] = lambda tensor: None
    """Replaces a tensor by its sum over all processes, in place."""


@dataclass(frozen=True)
class Spectrum:
    """What a rotation into singular bases found about each row (float64, CPU). Equal on every process."""

    sigma_N: Tensor
    """Singular values of B A, falling within each matrix, without the adapter's scaling; 0 for pruned rows."""
    curvature_N: Tensor
    """Estimated cost of removing the row, see :class:`salient_ds.salience.rotation.Rotated`."""


ReadShard = Callable[[str, Part], "Tensor"]
"""``read(stat, part)`` returns the saved statistic for exactly the elements of ``part``, shape (..., numel)."""


def neighbours(view: StepView, parts: Sequence[Part]) -> list[tuple[Part, ...]]:
    """``parts``, those together that ``view`` can show as one tensor."""
    return view.spans(parts) if isinstance(view, JoiningView) else [(part,) for part in parts]


def initial_decision(policy: MaskPolicy, layout: RankLayout) -> RankDecision:
    """The decision in force before the first event: all rows, or the first ``start_rank`` rows of every matrix."""
    import torch

    if policy.start_rank is None:
        return RankDecision(0, layout.total, torch.ones(layout.total, dtype=torch.bool))
    mask_N = torch.cat([torch.arange(rank) < policy.start_rank for rank in layout.ranks])
    return RankDecision(0, int(mask_N.sum()), mask_N, hold=False)
