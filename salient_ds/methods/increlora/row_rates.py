"""Gives single rows of a parameter their own learning rate, by rescaling what the optimizer's step changed.

Shape legend: n = elements of one part (any piece of a flattened factor that one process owns).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from salient_ds.ranks import Part, StepView

NEVER = -1
"""Stands for the step after which a row joined, if it has not joined yet."""


@dataclass(frozen=True)
class Run:
    """Adjacent rows that joined after the same step."""

    first: int
    last: int
    """One past the last row."""
    joined: int


def runs_of(joined: Sequence[int]) -> list[Run]:
    """Group the rows of one factor into runs. Rows that were active from the start are left out."""
    runs, first = [], 0
    for step, group in groupby(joined):
        last = first + len(list(group))
        if step != 0:
            runs.append(Run(first, last, step))
        first = last
    return runs


def row_pieces(part: Part, value_n: Tensor, first: int, last: int) -> list[Tensor]:
    """Live slices of ``value_n`` that hold its share of the factor's rows ``first`` .. ``last`` - 1 (at most three)."""
    assert part.rank_axis in (0, 1), "a factor that all ranks share has no rows"
    line = math.prod(part.shape[1:])
    if part.rank_axis == 0:
        return _filled([value_n[max(0, first * line - part.lo) : max(0, last * line - part.lo)]])
    start = part.lo % line
    head = min(part.numel, (line - start) % line)
    whole = (part.numel - head) // line
    head_n, body_n, tail_n = value_n.split([head, whole * line, part.numel - head - whole * line])
    in_head = head_n[max(0, first - start) : max(0, last - start)]
    return _filled([in_head, body_n.view(whole, line)[:, first:last], tail_n[first:last]])


def _filled(pieces: list[Tensor]) -> list[Tensor]:
    return [piece for piece in pieces if piece.numel()]


class RowRates:
    """Rescales the optimizer's update of chosen rows: p = p_old + factor (p_new - p_old).

    The whole update is scaled, weight decay included. Between :meth:`keep` and :meth:`rescale`, the chosen rows are
    kept as an fp32 copy, as far as this process owns them.
    """

    def __init__(self) -> None:
        self._runs: dict[tuple[int, str], list[Run]] = {}
        self._old: dict[str, list[Tensor]] = {}

    def choose(self, runs: dict[tuple[int, str], list[Run]]) -> None:
        """Set the rows to rescale, by (matrix, factor)."""
        self._runs = runs

    def keep(self, view: StepView) -> None:
        """Before the optimizer's step: copy the chosen rows of a view."""
        self._old[view.key] = [piece.clone() for piece, _ in self._pieces(view)]

    def rescale(self, view: StepView, factor: Callable[[int], float]) -> None:
        """After the optimizer's step: scale every chosen row's change by ``factor(step after which it joined)``."""
        found = self._pieces(view)
        old = self._old.pop(view.key)
        if not found:
            return
        pieces = [piece for piece, _ in found]
        factors = [factor(run.joined) for _, run in found]
        torch._foreach_sub_(pieces, old)
        torch._foreach_mul_(pieces, factors)
        torch._foreach_add_(pieces, old)

    def _pieces(self, view: StepView) -> list[tuple[Tensor, Run]]:
        return [
            (piece, run)
            for part in view.parts
            for run in self._runs.get((part.module, part.factor), [])
            for piece in row_pieces(part, view.value(part), run.first, run.last)
        ]
