"""Where a bank of adapters keeps each factor in its flat parameters.

Shape legend: R = rank, I/O = in/out features.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from salient_ds.adapters.ranked_linear import RankedLinear

MOST_ROWS = 768
"""Rows of one stack whose ranks differ: its Gram matrix takes the square of them, and each stack a dozen kernels."""


@dataclass(frozen=True)
class Slot:
    """Where the bank stores one factor."""

    adapter: RankedLinear
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


def lay_out(adapters: Sequence[RankedLinear], sigmas: bool) -> list[Slot]:
    """Assign offsets. Factors that can be stacked are adjacent, in the order of the adapters."""
    found = sorted(
        (factor, stack_key(factor, shape), index, shape)
        for index, adapter in enumerate(adapters)
        for factor, (shape, _) in adapter.factor_shapes().items()
        if (factor == "E") == sigmas
    )
    slots, offset = [], 0
    for factor, _, index, shape in found:
        slots.append(Slot(adapters[index], factor, shape, offset))
        offset += slots[-1].numel
    return slots


def stackable(slots: Sequence[Slot]) -> list[list[Slot]]:
    """The factors A and B by stack: neighbours with the same size along the axis that is not the rank axis.

    Where ranks differ, the Gram matrix of a stack is formed over all of its rows at once (:mod:`.stacked_penalty`). So
    a stack ends before it would have more than :data:`MOST_ROWS` of them.
    """
    groups: list[list[Slot]] = []
    for _, members in itertools.groupby(slots, key=lambda slot: (slot.factor, stack_key(slot.factor, slot.shape))):
        together = list(members)
        ragged, rows = len({slot.shape for slot in together}) > 1, 0
        for position, slot in enumerate(together):
            rank = slot.shape[0 if slot.factor == "A" else 1]
            if position == 0 or (ragged and rows + rank > MOST_ROWS):
                groups.append([])
                rows = 0
            groups[-1].append(slot)
            rows += rank
    return groups


def join(grads: Sequence[Tensor | None], sizes: list[int], like: Tensor) -> Tensor:
    """Concatenate gradients; a missing one becomes zeros."""
    return torch.cat(
        [like.new_zeros(size) if g is None else g.reshape(-1) for g, size in zip(grads, sizes, strict=True)]
    )
