"""LoRA (Hu et al. 2022): every rank stays. The baseline that adaptive methods are measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from salient_ds.methods.base import MaskPolicy, Part, RankDecision, RankLayout, ReadShard, StepView
from salient_ds.salience.budget import Event


class LoRA:
    """No statistic, no event."""

    name = "lora"
    policy = MaskPolicy(gate_forward=False, zero_vectors=False, zero_moments=False)
    events: Sequence[Event] = ()
    needs_penalty = False
    needs_before = False

    def attach(self, layout: RankLayout, views: Sequence[StepView]) -> None:
        """Nothing to prepare."""

    def before(self, view: StepView, step: int) -> None:
        """Nothing to observe."""

    def observe(self, view: StepView, step: int) -> None:
        """Nothing to observe."""

    def end_step(self, step: int, penalty_M2: Tensor | None) -> None:
        """Nothing to record."""

    def contribution(self) -> dict[str, Tensor]:
        return {}

    def allocate(self, statistics: dict[str, Tensor], event: Event, previous: RankDecision) -> RankDecision:
        """Never called: there is no event."""
        return previous

    def local_state(self) -> Iterator[tuple[str, Part, Tensor]]:
        return iter(())

    def shared_state(self) -> dict[str, Any]:
        return {}

    def load_state(self, shared: dict[str, Any], read: ReadShard) -> None:
        """Nothing to restore."""
