"""Options of AdaLoRA, and those that it shares with LoRA^2. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from salient_ds.methods.options import TargetConfig, warmup_steps
from salient_ds.ranks import Event, RankLayout
from salient_ds.salience.budget import AllocationPlan
from salient_ds.salience.cubic_budget import cubic_schedule

if TYPE_CHECKING:
    from salient_ds.adapters.options import AdapterConfig


@dataclass(frozen=True)
class SensitivityOptions:
    """Every point where the AdaLoRA paper (Zhang et al., ICLR 2023) and its released code disagree about decisions.

    In these points, LoRA^2's code is a copy of AdaLoRA's. (A third point, the form of the penalty, is
    ``adapter.orthogonality.form``.)
    """

    moment: Literal["paper", "reference"]
    """The weight in |weight * gradient|. paper: the one at which the gradient was taken. reference: the one after the
    step (released code)."""
    ties: Literal["exact", "threshold"]
    """exact: the budget is met exactly; in a tie, the lower row stays. threshold: all values at the cut are dropped
    (released code)."""


SENSITIVITY_PRESETS: dict[str, SensitivityOptions] = {
    "standard": SensitivityOptions(moment="reference", ties="exact"),
    "paper": SensitivityOptions(moment="paper", ties="exact"),
    "reference": SensitivityOptions(moment="reference", ties="threshold"),
}


class SensitivityConfig(TargetConfig):
    """What AdaLoRA and LoRA^2 share: the smoothed sensitivity and the cubic budget."""

    preset: Literal["standard", "paper", "reference"] = "standard"
    """Starting point for `moment` and `ties`. standard: the released code, but with budgets met exactly. paper: as in
    the paper. reference: as in the released code. `moment` and `ties` override the preset if they are set."""
    target_rank: float | None = Field(None, gt=0)
    """Mean rank per matrix at the end of allocation. If equal to adapter.rank, nothing is pruned (LoRA in SVD form)."""
    initial_warmup: float | None = Field(None, ge=0)
    """Steps before the budget starts to fall (t_i). A value below 1 is a fraction of all steps. Default: 0.1, so that
    learning has begun; 0 with the presets paper and reference."""
    final_warmup: float | None = Field(None, ge=0)
    """Steps at the end with fixed ranks (t_f). A value below 1 is a fraction of all steps. Default: 0.3, so that the
    run recovers from the last event; 0 with the presets paper and reference."""
    interval: int = Field(10, ge=1)
    """Steps between allocations (Delta_T). The AdaLoRA paper uses 1, 10 or 100, by task."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Decay of the smoothed sensitivity."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Decay of the smoothed uncertainty, the deviation from the smoothed sensitivity."""
    score: Literal["triplet", "gate_fisher"] = "triplet"
    """What singular values are kept for. triplet: sensitivity times uncertainty of a value and its vectors (paper).
    gate_fisher: the moving average (beta1) of (sigma dL/dsigma)^2, which needs one number per singular value."""
    moment: Literal["paper", "reference"] | None = None
    ties: Literal["exact", "threshold"] | None = None

    packable: ClassVar[bool] = True
    compactable: ClassVar[Literal["never", "last", "every"]] = "last"

    def problems(self, adapter: AdapterConfig) -> list[str]:
        """As :meth:`TargetConfig.problems`, and a budget in parameters that the released code's ties cannot keep."""
        found = super().problems(adapter)
        if self.budget_unit == "parameters" and self.options().ties == "threshold":
            found.append(
                "method.budget_unit=parameters needs method.ties=exact (threshold comes from the preset, if not set)"
            )
        return found

    @property
    def keeps_rates(self) -> bool:
        return self.preset == "reference"

    def options(self) -> SensitivityOptions:
        """The preset's options, overridden by the options that are set explicitly."""
        preset = SENSITIVITY_PRESETS[self.preset]
        return SensitivityOptions(self.moment or preset.moment, self.ties or preset.ties)

    def plan(self, layout: RankLayout, total_steps: int) -> AllocationPlan:
        """The numbers behind the events: totals and warm-ups.

        Raises:
            ValueError: see :class:`AllocationPlan` and :func:`steps_or_fraction`.
        """
        return AllocationPlan(
            total_steps=total_steps,
            initial_total=layout.total,
            target_total=self.wanted_total(len(layout.ranks)),
            initial_warmup=warmup_steps(self.initial_warmup, 0.1, self.preset, total_steps),
            final_warmup=warmup_steps(self.final_warmup, 0.3, self.preset, total_steps),
        )

    def events(self, layout: RankLayout, total_steps: int, steps_per_epoch: int | None = None) -> list[Event]:
        """One event every ``interval`` steps of the allocation phase, and a final one."""
        return cubic_schedule(self.plan(layout, total_steps), self.interval)

    def final_total(self, layout: RankLayout, total_steps: int) -> int:
        """The target."""
        return self.plan(layout, total_steps).target_total

    def scored_elements(self, layout: RankLayout) -> int:
        """Number of elements whose sensitivity is smoothed."""
        return layout.total if self.score == "gate_fisher" else self.adapter_parameters(layout)

    def statistics_bytes(self, layout: RankLayout) -> int:
        """Two moving averages per scored element. ``moment: paper`` also counts the weights before the step."""
        return (12 if self.options().moment == "paper" else 8) * self.scored_elements(layout)


class AdaLoRAConfig(SensitivityConfig):
    name: Literal["adalora"] = "adalora"

    implementation: ClassVar[str] = "salient_ds.methods.adalora.method:AdaLoRA"
    compilable: ClassVar[bool] = True
