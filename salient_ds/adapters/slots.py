"""Where a bank of adapters keeps each factor in its flat parameters.

Shape legend: R = rank, I/O = in/out features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from salient_ds.adapters.ranked_linear import RankedLinear


@dataclass(frozen=True)
class Slot:
    """Where the bank stores one factor."""

    adapter: RankedLinear
    layer: int
    """Index of the factor's layer within the bank."""
    factor: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def strides(self) -> tuple[int, ...]:
        return (self.shape[1], 1) if len(self.shape) == 2 else (1,)


def stack_key(factor: str, shape: tuple[int, ...]) -> int:
    """Size of the axis that is not the rank axis. Factors of one kind with the same key can be stacked.

    Singular values all have the same key, so they stay in the order of the adapters.
    """
    if factor == "E":
        return 0
    return shape[1] if factor == "A" else shape[0]


def lay_out(layers: list[list[RankedLinear]], sigmas: bool) -> list[Slot]:
    """Assign offsets layer by layer. Within a layer, factors that can be stacked are adjacent."""
    slots, offset = [], 0
    for layer, adapters in enumerate(layers):
        found = [
            (factor, stack_key(factor, shape), index, shape)
            for index, adapter in enumerate(adapters)
            for factor, (shape, _) in adapter.factor_shapes().items()
            if (factor == "E") == sigmas
        ]
        for factor, _, index, shape in sorted(found):
            slots.append(Slot(adapters[index], layer, factor, shape, offset))
            offset += slots[-1].numel
    return slots


def join(grads: Sequence[Tensor | None], sizes: list[int], like: Tensor) -> Tensor:
    """Concatenate gradients; a missing one becomes zeros."""
    return torch.cat(
        [like.new_zeros(size) if g is None else g.reshape(-1) for g, size in zip(grads, sizes, strict=True)]
    )
