"""Learning rates of rows that join a run late, as if they were a parameter group of their own. No torch.

Numbers: T = all steps, w = warm-up steps, e = step after which rows joined (0: from the start).  Steps are applied
optimizer steps, counted from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RatePlan:
    """What the optimizer and its schedule do to every parameter, known before the run."""

    schedule: Literal["linear", "cosine", "constant"]
    warmup: int
    total_steps: int
    betas: tuple[float, float]
    """Adam's."""
    weight_decay: float

    def rate(self, step: int, joined: int = 0) -> float:
        """Share of the base learning rate in ``step`` for parameters that joined after step ``joined``.

        Warm-up starts again at 0 with its full length, and the rest of the schedule is squeezed into what is left of
        the run (IncreLoRA's released code; there the step of the event itself, in which its new parameters have no
        gradient, shows the base rate).
        """
        done, length = step - 1 - joined, self.total_steps - joined
        assert done >= 0
        if done < self.warmup:
            return done / max(1, self.warmup)
        if self.schedule == "constant":
            return 1.0
        progress = (done - self.warmup) / max(1, length - self.warmup)
        if self.schedule == "linear":
            return max(0.0, 1.0 - progress)
        return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))

    def restart(self, step: int, joined: int) -> float:
        """How the update of rows that joined late relates to what the optimizer makes of them in ``step``.

        The quotient of the two learning rates, times that of Adam's bias corrections: the optimizer counts steps from
        the beginning, and with its usual betas would take up to 6.6 times too large steps along fresh moments. Exact
        up to Adam's epsilon.
        """
        usual = self.rate(step)
        if usual == 0.0:
            return 0.0
        return self.rate(step, joined) / usual * self._correction(step - joined) / self._correction(step)

    def _correction(self, steps: int) -> float:
        """Adam's factor on m / sqrt(v) after ``steps`` steps."""
        beta1, beta2 = self.betas
        return math.sqrt(1.0 - beta2**steps) / (1.0 - beta1**steps)
