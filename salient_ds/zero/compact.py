"""When a run goes on with other rows: pruned ones are dropped, and matrices that grow get more room.

How it is done: :mod:`salient_ds.zero.resize`.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from salient_ds.methods.base import RankDecision
from salient_ds.salience.budget import Event
from salient_ds.salience.growth import in_multiples
from salient_ds.zero.collectives import all_equal
from salient_ds.zero.resize import Rebuild, first_rows, resize

if TYPE_CHECKING:
    from salient_ds.zero.engine import AllocatingEngine


@runtime_checkable
class GrowingMethod(Protocol):
    """A method whose events may need rows that are not there yet, the first ones of every matrix at any time."""

    def room_for(self, event: Event, previous: RankDecision) -> tuple[int, ...] | None:
        """Rows that every matrix is to have before ``event`` is decided; None: those that it has. Pure."""
        ...


@dataclass
class Resizer:
    """Decides on other rows, and knows how the engine is made anew."""

    rebuild: Rebuild
    compaction: Literal["none", "last", "every"]
    multiple: int = 1
    """Matrices that get another size keep pruned rows, or get spare ones, up to a multiple of so many."""
    _done: RankDecision | None = None
    """The decision whose pruned rows have been looked through."""

    def before_event(self, engine: AllocatingEngine, event: Event) -> float | None:
        """Make the room that ``event`` needs; seconds it took, None if it was there.

        Raises:
            RuntimeError: on all processes, if they do not need the same.
        """
        if not isinstance(engine.method, GrowingMethod):
            return None
        began = time.perf_counter()
        room_M = engine.method.room_for(event, engine.in_force.latest)
        if not all_equal(hashlib.sha256(repr(room_M).encode()).hexdigest(), engine.device):
            raise RuntimeError(
                f"processes disagree on the rows that the event of step {event.step} needs (here: {room_M}): their "
                "statistics or hardware differ; nothing was applied, resume from the last checkpoint"
            )
        if room_M is None:
            return None
        most_M = engine.initial_layout.ranks
        room_M = tuple(in_multiples(room, self.multiple, most) for room, most in zip(room_M, most_M, strict=True))
        resize(engine, self.rebuild, first_rows(engine.initial_layout, room_M))
        return time.perf_counter() - began

    def after_step(self, engine: AllocatingEngine) -> float | None:
        """Compact if a decision that is to be compacted has just come into force; seconds it took, None if not."""
        force, events = engine.in_force, engine.method.events
        decision = force.held
        if self.compaction == "none" or not events or force.pending or not decision.hold:
            return None
        if self.compaction == "last":
            due = engine.step >= events[-1].step  # later too: a checkpoint may come from a run without compaction
        else:
            due = engine.step - decision.step <= engine.method.policy.delay  # never inside a window
        if not due or decision is self._done:
            return None
        began = time.perf_counter()
        stay_n = rounded_up(decision.mask_N, engine.adapted.layout.ranks, self.multiple)
        compacts = not bool(stay_n.all())
        if compacts:
            resize(engine, self.rebuild, engine.in_initial_rows(stay_n))
        self._done = engine.in_force.held  # a compaction has put another one there, over the rows that are left
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
