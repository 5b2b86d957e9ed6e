"""The order in which decisions are taken and take effect. Knows neither DeepSpeed nor shards.

The engine, and the plain training loop of tests and benchmarks, go through this one sequence:

    inside the optimizer's step, after it wrote the masters   before_observation(), then the method observes
    after an applied step                                     settle(), then the method ends its step
    at an event                                               take(decision)
    after the last step                                       settle()
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from salient_ds.ranks import MaskPolicy, RankDecision


class Actuator(Protocol):
    """Brings parameters in line with a decision."""

    def hold(self, decision: RankDecision) -> None:
        """After every later step, zero the singular values that ``decision`` drops (if its ``hold`` is set)."""
        ...

    def apply(self, decision: RankDecision) -> None:
        """Bring masks, values and moments in line with ``decision``."""
        ...

    def start_rows(self, new_N: Tensor, sigma: float) -> None:
        """Set E to ``sigma`` in the rows ``new_N`` (bool, CPU), which an event has just switched on."""
        ...


@dataclass
class Decisions:
    """The latest decision taken and the one that is enforced. They differ for one step if the policy delays.

    Attributes:
        latest: the decision taken last.
        held: the decision that is enforced.
        pending: decisions that wait for the next step.
    """

    policy: MaskPolicy
    actuator: Actuator
    latest: RankDecision
    held: RankDecision
    pending: list[RankDecision] = field(default_factory=list)

    def before_observation(self) -> None:
        """Enforce a decision that waited for this step, before the method observes."""
        if self.pending:
            self._hold(self.pending[0])

    def settle(self) -> None:
        """Apply a decision that waited for the step that has just ended."""
        if self.pending:
            self.apply(self.pending.pop(0))

    def take(self, decision: RankDecision) -> int:
        """Record a new decision. It takes effect now, or after the next step if the policy delays.

        Returns:
            Number of rows that it switches on or off.
        """
        previous, self.latest = self.latest, decision
        if self.policy.delay:
            self.pending.append(decision)
        else:
            self.apply(decision)
            if self.policy.start_sigma is not None:
                self.actuator.start_rows(decision.mask_N & ~previous.mask_N, self.policy.start_sigma)
        return int((decision.mask_N != previous.mask_N).sum())

    def apply(self, decision: RankDecision) -> None:
        """Let ``decision`` take effect now."""
        self._hold(decision)
        self.actuator.apply(decision)

    def _hold(self, decision: RankDecision) -> None:
        if decision is not self.held:
            self.held = decision
            self.actuator.hold(decision)
