"""In which order decisions take effect: taken, held, pending, applied. Knows neither DeepSpeed nor shards.

The engine and the plain training of tests and benchmarks go through this one sequence:

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
    """What brings parameters in line with a decision."""

    def hold(self, decision: RankDecision) -> None:
        """From now on, zero the singular values that ``decision`` drops after every step (if it holds them)."""
        ...

    def apply(self, decision: RankDecision) -> None:
        """Bring masks, values and moments in line with ``decision``."""
        ...

    def start_rows(self, new_N: Tensor, sigma: float) -> None:
        """Give E of the rows ``new_N`` (bool, CPU), which an event has switched on, its first value."""
        ...


@dataclass
class Decisions:
    """The last decision taken, and the one that masks; they differ for one step if the policy delays."""

    policy: MaskPolicy
    actuator: Actuator
    latest: RankDecision
    held: RankDecision
    pending: list[RankDecision] = field(default_factory=list)

    def before_observation(self) -> None:
        """A decision that waited for this step masks from here on, before the method looks."""
        if self.pending:
            self._hold(self.pending[0])

    def settle(self) -> None:
        """A decision that waited for the step that is over takes effect."""
        if self.pending:
            self.apply(self.pending.pop(0))

    def take(self, decision: RankDecision) -> int:
        """A new decision, which takes effect now or after the next step; returns how many rows it changes."""
        previous, self.latest = self.latest, decision
        if self.policy.delay:
            self.pending.append(decision)
        else:
            self.apply(decision)
            if self.policy.start_sigma is not None:
                self.actuator.start_rows(decision.mask_N & ~previous.mask_N, self.policy.start_sigma)
        return int((decision.mask_N != previous.mask_N).sum())

    def apply(self, decision: RankDecision) -> None:
        """``decision`` takes effect now."""
        self._hold(decision)
        self.actuator.apply(decision)

    def _hold(self, decision: RankDecision) -> None:
        if decision is not self.held:
            self.held = decision
            self.actuator.hold(decision)
