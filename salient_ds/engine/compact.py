"""Decides when a run changes its number of rows: pruned rows are dropped, and growing matrices get more room.

:mod:`salient_ds.engine.resize` carries it out.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from salient_ds.engine.resize import Rebuild, first_rows, resize
from salient_ds.engine.state import AllocationState
from salient_ds.methods.duties import GrowingMethod
from salient_ds.ranks import Event, RankDecision
from salient_ds.zero.collectives import all_equal


@dataclass
class Resizer:
    """Decides when to drop rows (compaction) or make room for more (growth), and can rebuild the engine."""

    rebuild: Rebuild
    compaction: Literal["none", "last", "every"]
    multiple: int = 1
    """Resized matrices are rounded up to a multiple of this number of rows. A compaction keeps pruned rows for that,
    growth adds spare ones."""
    _done: RankDecision | None = None
    """The last decision whose pruned rows were considered for dropping."""

    def before_event(self, state: AllocationState, event: Event) -> float | None:
        """Make room for the rows that ``event`` may add.

        Returns:
            Seconds it took; None if there was enough room.

        Raises:
            RuntimeError: on all processes, if they disagree on the room that is needed.
        """
        if not isinstance(state.method, GrowingMethod):
            return None
        began = time.perf_counter()
        room_M = state.method.room_for(event, state.decisions.latest)
        if not all_equal(hashlib.sha256(repr(room_M).encode()).hexdigest(), state.device):
            raise RuntimeError(
                f"processes disagree on the rows that the event of step {event.step} needs (here: {room_M}): their "
                "statistics or hardware differ; nothing was applied, resume from the last checkpoint"
            )
        if room_M is None:
            return None
        most_M = state.initial_layout.ranks
        room_M = tuple(in_multiples(room, self.multiple, most) for room, most in zip(room_M, most_M, strict=True))
        resize(state, self.rebuild, first_rows(state.initial_layout, room_M))
        return time.perf_counter() - began

    def after_step(self, state: AllocationState) -> float | None:
        """Drop pruned rows, if a decision after which to compact has just taken effect.

        Returns:
            Seconds it took; None if nothing was dropped.
        """
        decisions, events = state.decisions, state.method.events
        decision = decisions.held
        if self.compaction == "none" or not events or decisions.pending or not decision.hold:
            return None
        if self.compaction == "last":
            due = state.step >= events[-1].step  # later too: a run may resume from one without compaction
        else:
            due = state.step - decision.step <= state.method.policy.delay  # never inside an observation window
        if not due or decision is self._done:
            return None
        began = time.perf_counter()
        stay_n = rounded_up(decision.mask_N, state.adapted.layout.ranks, self.multiple)
        compacts = not bool(stay_n.all())
        if compacts:
            resize(state, self.rebuild, state.in_initial_rows(stay_n))
        self._done = state.decisions.held  # read again: a compaction replaced it by one over the remaining rows
        return time.perf_counter() - began if compacts else None


def rounded_up(mask_N: Tensor, ranks: Sequence[int], multiple: int) -> Tensor:
    """Extend ``mask_N`` (bool) so that every matrix has a multiple of ``multiple`` rows in it.

    The first rows outside of the mask are added. A matrix stays as it is if it has no row in the mask, or too few rows
    to reach the multiple. Example: with ``multiple`` 8, a matrix of 16 rows with 13 in the mask gets all 16.

    Args:
        ranks: number of rows of every matrix.
    """
    parts = []
    for mask_R in mask_N.split(list(ranks)):
        live = int(mask_R.sum())
        filling = -live % multiple
        if live + filling > len(mask_R):
            filling = 0
        parts.append(mask_R | (~mask_R & ((~mask_R).cumsum(0) <= filling)))
    return torch.cat(parts)


def in_multiples(room: int, multiple: int, most: int) -> int:
    """``room`` rounded up to a multiple of ``multiple``, but no more than ``most``."""
    return min(most, -(-room // multiple) * multiple)
