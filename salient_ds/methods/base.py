"""A base class for methods, and helpers that methods share. Importing this file loads no torch.

Shape legend: M = adapted matrices, N = rows (:mod:`salient_ds.ranks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from salient_ds.methods.options import MethodConfig
from salient_ds.ranks import Event, MaskPolicy, Part, RankDecision, RankLayout, ReadShard, StepView

if TYPE_CHECKING:
    from torch import Tensor


def refuse_non_finite(what: str, modules: Sequence[str], bad: Sequence[int], when: str) -> None:
    """Raise ValueError if any matrix has statistics that are not finite.

    Args:
        what: the statistic, for example "sensitivity scores".
        bad: indices into ``modules`` of the matrices whose statistics are not finite.
        when: for example "at step 7".
    """
    if not bad:
        return
    names = ", ".join(modules[k] for k in bad[:3]) + (" ..." if len(bad) > 3 else "")
    raise ValueError(
        f"{what} of {len(bad)} matrices ({names}) were not finite {when}: training has diverged, lower train.lr or "
        "resume from an earlier checkpoint"
    )


def modules_of_rows(layout: RankLayout, rows_N: Tensor) -> list[int]:
    """Indices of the matrices that own at least one of the marked rows (bool, N), in order."""
    return sorted(set(layout.module_of_row_N[rows_N.cpu()].tolist()))


class BaseMethod:
    """A method without statistics of its own. Subclasses override what they need; with events, at least ``allocate``.

    Args of the constructor: the method's options, the layout of all rows that may ever exist, and the number of applied
    steps of the run.
    """

    name: str
    policy = MaskPolicy(gate_forward=True, zero_vectors=True, zero_moments=True)
    needs_penalty = False
    needs_before = False

    def __init__(self, config: MethodConfig, layout: RankLayout, total_steps: int) -> None:
        self.name = config.name
        self.layout = layout
        self.events: Sequence[Event] = config.events(layout, total_steps)

    def attach(self, layout: RankLayout, views: Sequence[StepView]) -> None:
        """Nothing to prepare."""

    def resized(self, layout: RankLayout) -> None:
        """Continue with the rows of ``layout``."""
        self.layout = layout

    def before(self, view: StepView, step: int) -> None:
        """Nothing to observe."""

    def observe(self, view: StepView, step: int) -> None:
        """Nothing to observe."""

    def end_step(self, step: int, penalty_M2: Tensor | None) -> None:
        """Nothing to record."""

    def contribution(self) -> dict[str, Tensor]:
        """No statistic to sum over processes."""
        return {}

    def allocate(self, statistics: dict[str, Tensor], event: Event, previous: RankDecision) -> RankDecision:
        """A method with events must override this."""
        raise NotImplementedError(f"{type(self).__name__} has events but no allocate()")

    def local_state(self) -> Iterator[tuple[str, Part, Tensor]]:
        """Nothing is sharded."""
        return iter(())

    def shared_state(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state(self, shared: dict[str, Any], read: ReadShard) -> None:
        """Nothing to restore."""
