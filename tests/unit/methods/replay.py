"""Training without a model: given weights and gradients, cut into shards, drive a method as the engine would.

Shape legend: P = all elements of all factors, one after the other; N = singular values, R = ranks of one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from salient_ds.methods.duties import Method
from salient_ds.ranks import Part, RankDecision, RankLayout

Values = dict[tuple[int, str], Tensor]
"""Whole factors by (matrix, short name)."""


@dataclass(frozen=True)
class Factor:
    module: int
    name: str
    shape: tuple[int, ...]
    rank_axis: int | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def svd_factors(layout: RankLayout) -> list[Factor]:
    """A (R, I), E (R,), B (O, R) of every matrix."""
    out = []
    for k, (rank, wide, tall) in enumerate(zip(layout.ranks, layout.in_features, layout.out_features, strict=True)):
        out += [Factor(k, "A", (rank, wide), 0), Factor(k, "E", (rank,), 0), Factor(k, "B", (tall, rank), 1)]
    return out


def two_scale_factors(layout: RankLayout, inner: int) -> list[Factor]:
    """A (k, I), B (R, k), E (R,), aa (k, R), bb (O, k) of every matrix."""
    out = []
    for k, (rank, wide, tall) in enumerate(zip(layout.ranks, layout.in_features, layout.out_features, strict=True)):
        out += [Factor(k, "A", (inner, wide), None), Factor(k, "B", (rank, inner), 0), Factor(k, "E", (rank,), 0)]
        out += [Factor(k, "aa", (inner, rank), 1), Factor(k, "bb", (tall, inner), None)]
    return out


def uneven_cuts(total: int, pieces: int) -> list[int]:
    """Borders 0 .. total of pieces that get longer, and that do not care where rows begin."""
    weights = [i + 1 for i in range(pieces)]
    return [total * sum(weights[:i]) // sum(weights) for i in range(pieces)] + [total]


@dataclass
class ShardView:
    """Elements [start, stop) of the flat buffer; a StepView."""

    key: str
    parts: tuple[Part, ...]
    at: dict[Part, int]
    values_P: Tensor
    grads_P: Tensor

    def value(self, part: Part) -> Tensor:
        return self.values_P[self.at[part] : self.at[part] + part.numel]

    def grad(self, part: Part) -> Tensor:
        return self.grads_P[self.at[part] : self.at[part] + part.numel]

    def sigma(self) -> tuple[Tensor, Tensor]:
        raise AssertionError("sensitivity looks at single parts")


@dataclass
class Replay:
    """The engine's part: hooks, events, zeroed values. All processes live here, one piece of the buffer each."""

    make: Callable[[], Any]
    layout: RankLayout
    factors: Sequence[Factor]
    pieces: int = 1
    decisions: list[RankDecision] = field(default_factory=list)
    scores: list[Tensor] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        total = sum(f.numel for f in self.factors)
        self.values_P, self.grads_P = torch.zeros(total), torch.zeros(total)
        everything = torch.ones(self.layout.total, dtype=torch.bool)
        self.in_force = RankDecision(0, self.layout.total, everything)
        self.methods: list[Method] = []
        self.views: list[ShardView] = []
        for start, stop in pairwise(uneven_cuts(total, self.pieces)):
            at = dict(self._parts(start, stop))
            self.views.append(ShardView("buffer0", tuple(at), at, self.values_P, self.grads_P))
            self.methods.append(self.make())
            self.methods[-1].attach(self.layout, [self.views[-1]])

    def _parts(self, start: int, stop: int) -> Iterator[tuple[Part, int]]:
        first = 0
        for f in self.factors:
            lo, hi = max(first, start), min(first + f.numel, stop)
            if lo < hi:
                yield Part(f.name, f.module, lo - first, hi - lo, f.shape, f.rank_axis), lo
            first += f.numel

    def train_step(self, values: Values, grads: Values) -> Values:
        """One step: ``values`` are those after the optimizer; returns them as they are after hook and event."""
        self.step += 1
        pairs = list(zip(self.methods, self.views, strict=True))
        self.grads_P.copy_(self._flat(grads))
        for method, view in pairs:
            if method.needs_before:
                method.before(view, self.step)
        self.values_P.copy_(self._flat(values))
        if self.in_force.hold:
            self._zero_sigma(self.in_force)
        for method, view in pairs:
            method.observe(view, self.step)
            method.end_step(self.step, None)
        for event in self.methods[0].events:
            if event.step == self.step:
                parts = [method.contribution() for method in self.methods]
                statistics = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
                made = [method.allocate(statistics, event, self.in_force) for method in self.methods]
                assert len({decision.digest() for decision in made}) == 1
                self.in_force = made[0]
                self.decisions.append(made[0])
                self.scores.append(statistics["score"])
                self._zero_sigma(self.in_force)
        return self._whole(self.values_P)

    def _zero_sigma(self, decision: RankDecision) -> None:
        masks = decision.mask_N.split(list(self.layout.ranks))
        first = 0
        for f in self.factors:
            if f.name == "E":
                self.values_P[first : first + f.numel].masked_fill_(~masks[f.module], 0)
            first += f.numel

    def _flat(self, values: Values) -> Tensor:
        return torch.cat([values[f.module, f.name].reshape(-1) for f in self.factors])

    def _whole(self, flat_P: Tensor) -> Values:
        pieces = flat_P.split([f.numel for f in self.factors])
        return {(f.module, f.name): p.clone().view(f.shape) for f, p in zip(self.factors, pieces, strict=True)}

    def statistics(self) -> dict[str, Values]:
        """What would be saved, put together: whole factors by statistic."""
        shapes = {(f.module, f.name): f.shape for f in self.factors}
        found: dict[str, Values] = {}
        for method in self.methods:
            for name, part, value in method.local_state():
                at = part.module, part.factor
                whole = found.setdefault(name, {}).setdefault(at, torch.full(shapes[at], torch.nan))
                whole.view(-1)[part.lo : part.lo + part.numel] = value
        return found

    def save(self) -> dict[str, Any]:
        shared = [method.shared_state() for method in self.methods]
        assert all(s == shared[0] for s in shared)
        return {"step": self.step, "in_force": self.in_force, "shared": shared[0], "statistics": self.statistics(),
                "values_P": self.values_P.clone()}  # fmt: skip

    def load(self, saved: dict[str, Any]) -> Replay:
        """Go on from a checkpoint, whatever the shards were."""

        def read(name: str, part: Part) -> Tensor:
            whole: Tensor = saved["statistics"][name][part.module, part.factor]
            return whole.view(-1)[part.lo : part.lo + part.numel]

        self.step, self.in_force = saved["step"], saved["in_force"]
        self.values_P.copy_(saved["values_P"])
        for method in self.methods:
            method.load_state(saved["shared"], read)
        return self


def random_run(
    factors: Sequence[Factor], steps: int, seed: int, dtype: torch.dtype = torch.float32
) -> list[tuple[Values, Values]]:
    """Weights that drift and noisy gradients whose scales differ by row and matrix."""
    g = torch.Generator().manual_seed(seed)
    weights = {(f.module, f.name): torch.randn(f.shape, generator=g, dtype=dtype) for f in factors}
    scales = {at: torch.exp(torch.randn(w.shape[-1:], generator=g, dtype=dtype)) for at, w in weights.items()}
    run = []
    for _ in range(steps):
        grads = {at: torch.randn(w.shape, generator=g, dtype=dtype) * scales[at] for at, w in weights.items()}
        weights = {at: w - 0.05 * grads[at] for at, w in weights.items()}
        run.append((weights, grads))
    return run
