"""When a run goes on with other rows: pruned ones are dropped, and matrices that grow get more room.

How it is done: :mod:`salient_ds.engine.resize`.
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
    """Decides on other rows, and knows how the engine is made anew."""

    rebuild: Rebuild
    compaction: Literal["none", "last", "every"]
    multiple: int = 1
    """Matrices that get another size keep pruned rows, or get spare ones, up to a multiple of so many."""
    _done: RankDecision | None = None
    """The decision whose pruned rows have been looked through."""

    def before_event(self, state: AllocationState, event: Event) -> float | None:
        """Make the room that ``event`` needs; seconds it took, None if it was there.

        Raises:
            RuntimeError: on all processes, if they do not need the same.
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
        """Compact if a decision that is to be compacted has just come into force; seconds it took, None if not."""
        decisions, events = state.decisions, state.method.events
        decision = decisions.held
        if self.compaction == "none" or not events or decisions.pending or not decision.hold:
            return None
        if self.compaction == "last":
            due = state.step >= events[-1].step  # later too: a checkpoint may come from a run without compaction
        else:
            due = state.step - decision.step <= state.method.policy.delay  # never inside a window
        if not due or decision is self._done:
            return None
        began = time.perf_counter()
        stay_n = rounded_up(decision.mask_N, state.adapted.layout.ranks, self.multiple)
        compacts = not bool(stay_n.all())
        if compacts:
            resize(state, self.rebuild, state.in_initial_rows(stay_n))
        self._done = state.decisions.held  # a compaction has put another one there, over the rows that are left
        return time.perf_counter() - began if compacts else None


def rounded_up(mask_N: Tensor, ranks: Sequence[int], multiple: int) -> Tensor:
    """``mask_N`` (bool) and the first other rows of every matrix, so that it has a multiple of ``multiple``.

    A matrix without any row in the mask gets none, nor does one that has too few rows to get there.
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
    """``room`` rows rounded up to a multiple, but no more than ``most``."""
    return min(most, -(-room // multiple) * multiple)
