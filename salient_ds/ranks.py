"""The types that pass between the maths of a method and the engine that trains. Importing this file loads no torch.

Shape legend: M = adapted matrices, R = rows of one matrix, N = sum of all R, n = elements held by this process.
A *row* is one singular value with its two vectors. Rows are numbered matrix after matrix: matrix k owns rows
``offsets[k]`` to ``offsets[k + 1]``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Event:
    """One allocation: right after ``step``, ``total_rank`` rows may live."""

    step: int
    """Applied optimizer step (1-based) after which it happens."""
    total_rank: int
    """Budget: the allowed sum of ranks from here on."""
    window_start: int
    """First step whose singular values are looked at; the window covers window_start..step, both included."""
    window: int
    """Length of the window in steps."""


@dataclass(frozen=True)
class RankLayout:
    """The adapted matrices in the order of the model, the same on every process."""

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
        """N, the number of rows."""
        return self.offsets[-1]

    @cached_property
    def module_of_row_N(self) -> Tensor:
        """Index of the matrix that each row belongs to (int64, CPU)."""
        import torch

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


@dataclass(frozen=True)
class AdamSettings:
    """What the optimizer works with in one step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    decoupled: bool
    """AdamW; otherwise the decay is part of the gradient."""


class AdamView(StepView, Protocol):
    """A :class:`StepView` whose optimizer state can be reached as well."""

    def moments(self, part: Part) -> dict[str, Tensor]:
        """Live slices of the optimizer's state for ``part`` by name ("exp_avg", ...); empty before the first step."""
        ...

    def settings(self, part: Part) -> AdamSettings:
        """What the optimizer steps ``part`` with; only inside its step."""
        ...


@dataclass(frozen=True)
class WorkShare:
    """Which part of a divided computation this process does, and how the parts come together."""

    global_rank: int = 0
    world_size: int = 1
    combine: Callable[[Tensor], None] = lambda tensor: None
    """In place: the sum of a tensor over all processes."""


ReadShard = Callable[[str, Part], "Tensor"]
"""``read(stat, part)`` returns the saved statistic for exactly the elements of ``part``, shape (..., numel)."""


def initial_decision(policy: MaskPolicy, layout: RankLayout) -> RankDecision:
    """What is in force before the first event: all rows, or the first ``start_rank`` of every matrix."""
    import torch

    if policy.start_rank is None:
        return RankDecision(0, layout.total, torch.ones(layout.total, dtype=torch.bool))
    mask_N = torch.cat([torch.arange(rank) < policy.start_rank for rank in layout.ranks])
    return RankDecision(0, int(mask_N.sum()), mask_N, hold=False)
