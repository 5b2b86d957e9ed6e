"""Learning rates of rows that join a run late, as if they had their own parameter group. No torch.

Numbers: T = all steps, w = warm-up steps, e = step after which rows joined (0: from the start). Steps are applied
optimizer steps, counted from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class RatePlan:
    """The learning-rate schedule and Adam settings of all parameters, known before the run."""

    schedule: Literal["linear", "cosine", "constant"]
    warmup: int
    total_steps: int
    betas: tuple[float, float]
    """Adam's."""
    weight_decay: float

    def rate(self, step: int, joined: int = 0) -> float:
        """Fraction of the base learning rate in ``step``, for parameters that joined after step ``joined``.

        Warm-up starts again at 0 with its full length. The rest of the schedule is compressed into what is left of the
        run, as in IncreLoRA's released code. (There, the step of the event itself shows the base rate; its new
        parameters have no gradient in that step.)
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
        """Factor from the optimizer's update of late rows in ``step`` to the update that they should get.

        It is the quotient of the two learning rates, times the quotient of Adam's bias corrections. The optimizer
        counts steps from the start of the run. With the usual betas, its steps along fresh moments would be up to 6.6
        times too large. The factor is exact up to Adam's epsilon.
        """
        usual = self.rate(step)
        if usual == 0.0:
            return 0.0
        return self.rate(step, joined) / usual * self._correction(step - joined) / self._correction(step)

    def _correction(self, steps: int) -> float:
        """Adam's bias correction of m / sqrt(v) after ``steps`` steps."""
        beta1, beta2 = self.betas
        return math.sqrt(1.0 - beta2**steps) / (1.0 - beta1**steps)
