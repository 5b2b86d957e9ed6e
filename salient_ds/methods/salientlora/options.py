"""Options of SalientLoRA, with presets where the paper and its released code disagree. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import isfinite
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, model_validator

from salient_ds.methods.options import TargetConfig, warmup_steps
from salient_ds.ranks import Event, RankLayout
from salient_ds.salience.budget import AllocationPlan, paper_schedule, reference_schedule

if TYPE_CHECKING:
    from salient_ds.adapters.options import AdapterConfig

_OF_SALIENCE = (
    "beta", "gamma", "lambda_", "leaf_influence", "combine", "normalisation", "magnitude", "loss_weights", "edges",
)  # fmt: skip
"""Options that only ``score: salience`` reads."""
_EVENT_BYTES_PER_VALUE = 24
_EVENT_BLOCK = 256 * 2**20


@dataclass(frozen=True)
class SalientOptions:
    """Every point where the SalientLoRA paper (Ke et al., NeurIPS 2024) and its released code disagree."""

    schedule: Literal["paper", "reference"]
    """paper: progress is a fraction of the allocation phase n_f. reference: it is divided by n_i + n_f, as in the
    released code (n_i: initial warm-up)."""
    final_prune: bool
    """Whether a last event at the end of the allocation phase leaves exactly the target budget."""
    leaf_influence: float
    """Influence reported for a value without outgoing edges: 1 (paper) or 0 (released code)."""
    combine: Literal["mix", "sum"]
    """mix: lambda * magnitude + (1 - lambda) * influence (paper). sum: plain sum (released code)."""
    normalisation: Literal["printed", "released", "robust"]
    """printed: none. released: magnitude is normalised per module, influence over all values. robust: percentiles over
    all live values, for both.

    The paper does not state a normalisation. The standard and paper presets use robust because it recovers planted
    ranks, while released gives rows to matrices that need none: eval/records/*_planted-rank_*."""
    magnitude: Literal["absolute", "signed"]
    """absolute: |sigma| (released code). signed: sigma, as printed in the paper."""
    loss_weights: Literal["normalised", "per_module", "global"]
    """What weights a value's history. per_module: the orthogonality loss of its own matrix (paper). normalised: the
    same, divided by its mean, so that it weights steps and not matrices. global: the loss over all matrices (released
    code)."""
    edges: Literal["tolerant", "strict"]
    """Pairs of values within 1e-6 of the thresholds beta and gamma, as with a slope of exactly 2. tolerant: they depend
    on each other, on every device. strict: decided in float64 without a slack (code)."""
    apply_at: Literal["now", "next_step"]
    """When a decision takes effect: right after the event (paper), or after the next optimizer step (released code)."""
    ties: Literal["exact", "threshold"]
    """exact: the budget is met exactly; ties are broken by (score, module, row). threshold: all values at the cut are
    dropped (released code)."""
    nan_scores: Literal["zero", "reference"]
    """zero: 0/0 counts as 0, and pruned rows are not ranked. reference: NaN ranks as the largest score, and is masked
    (released code)."""
    pruned_vectors: Literal["zero", "train"]
    """zero: the vectors of pruned rows are zeroed too, and leave the orthogonality penalty (paper). train: only E is
    masked (released code)."""


SALIENT_PRESETS: dict[str, SalientOptions] = {
    "standard": SalientOptions(
        schedule="paper", final_prune=True, leaf_influence=1.0, combine="mix", normalisation="robust",
        magnitude="absolute", loss_weights="normalised", edges="tolerant", apply_at="now", ties="exact",
        nan_scores="zero", pruned_vectors="zero",
    ),
    "paper": SalientOptions(
        schedule="paper", final_prune=True, leaf_influence=1.0, combine="mix", normalisation="robust",
        magnitude="absolute", loss_weights="per_module", edges="tolerant", apply_at="now", ties="exact",
        nan_scores="zero", pruned_vectors="zero",
    ),
    "reference": SalientOptions(
        schedule="reference", final_prune=False, leaf_influence=0.0, combine="sum", normalisation="released",
        magnitude="absolute", loss_weights="global", edges="strict", apply_at="next_step", ties="threshold",
        nan_scores="reference", pruned_vectors="train",
    ),
}  # fmt: skip


class SalientLoRAConfig(TargetConfig):
    name: Literal["salientlora"] = "salientlora"
    preset: Literal["standard", "paper", "reference"] = "standard"
    """Starting point for the options from `schedule` on, which :class:`SalientOptions` explains. An option that is set
    overrides the preset. standard: the paper, with loss weights that cannot decide between matrices. paper: the paper,
    robustly normalised. reference: the released code."""
    initial_warmup: float | None = Field(None, ge=0)
    """Steps before allocation starts (n_i). A value below 1 is a fraction of all steps. Default: 0.1, so that learning
    has begun; 0 with the presets paper and reference."""
    final_warmup: float | None = Field(None, ge=0)
    """Steps after allocation ends. A value below 1 is a fraction of all steps. Default: 0.3, so that the run recovers
    from the last event; 0 with the presets paper and reference."""
    window_initial: int = Field(10, ge=2)
    """Length of the first window in steps (T_i)."""
    window_final: int = Field(200, ge=2)
    """Length that windows grow to, in steps (T_f). If it equals `window_initial`, all windows have that length."""
    score: Literal["salience", "gate_fisher"] = "gate_fisher"
    """What singular values are kept for. gate_fisher: the mean of (sigma dL/dsigma)^2 over the window. salience:
    magnitude and influence, as in the paper. Default: gate_fisher, with which SalientLoRA beat tuned LoRA of the same
    size where salience did not (eval/records/*evidence*); salience with the presets paper and reference, and wherever
    an option is set that only salience reads: beta, gamma, lambda and those from leaf_influence to edges."""
    beta: float = Field(0.9, gt=0, le=1)
    """Smallest correlation of two singular values' histories that makes a dependency."""
    gamma: float = 2.0
    """Smallest slope that makes a dependency; must be above 1."""
    lambda_: float = Field(0.7, ge=0, le=1, alias="lambda")
    """Weight of the magnitude in the mixed score. The influence gets 1 - lambda."""
    schedule: Literal["paper", "reference"] | None = None
    final_prune: bool | None = None
    leaf_influence: Literal[0, 1] | None = None
    combine: Literal["mix", "sum"] | None = None
    normalisation: Literal["printed", "released", "robust"] | None = None
    magnitude: Literal["absolute", "signed"] | None = None
    loss_weights: Literal["normalised", "per_module", "global"] | None = None
    edges: Literal["tolerant", "strict"] | None = None
    apply_at: Literal["now", "next_step"] | None = None
    ties: Literal["exact", "threshold"] | None = None
    nan_scores: Literal["zero", "reference"] | None = None
    pruned_vectors: Literal["zero", "train"] | None = None

    implementation: ClassVar[str] = "salient_ds.methods.salientlora.method:SalientLoRA"
    packable: ClassVar[bool] = True
    compilable: ClassVar[bool] = True
    compactable: ClassVar[Literal["never", "last", "every"]] = "every"

    @model_validator(mode="after")
    def _consistent(self) -> SalientLoRAConfig:
        if not isfinite(self.gamma):
            raise ValueError(f"method.gamma={self.gamma} is no number: give one above 1 (the paper uses 2)")
        if self.gamma <= 1:
            raise ValueError(
                f"method.gamma={self.gamma:g} must be above 1: only then does the variance grow along every edge, so "
                "that the dependency graph has no cycle and the influence is defined (the paper uses 2)"
            )
        self._all_read()
        if self.window_final < self.window_initial:
            raise ValueError(
                f"method.window_final={self.window_final} is below method.window_initial={self.window_initial}: "
                "windows grow during training, swap or raise them"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _chosen_score(cls, values: Any) -> Any:
        """Fill in ``score``, so that what is saved says which one it was."""
        if not isinstance(values, Mapping) or values.get("score") is not None:
            return values
        of_salience = any(values.get(name) is not None for name in (*_OF_SALIENCE, "lambda"))
        salience = of_salience or values.get("preset", "standard") != "standard"
        return {**values, "score": "salience" if salience else "gate_fisher"}

    def _all_read(self) -> None:
        """Refuse options that ``score: gate_fisher`` does not read.

        Raises:
            ValueError: one of them is not at its default.
        """
        fields = type(self).model_fields
        unread = [name for name in _OF_SALIENCE if getattr(self, name) != fields[name].default]
        if self.score == "gate_fisher" and unread:
            shown = ", ".join(f"method.{name.rstrip('_')}" for name in unread)
            raise ValueError(f"method.score=gate_fisher does not read {shown}: remove it, or set method.score=salience")

    def problems(self, adapter: AdapterConfig) -> list[str]:
        """As :meth:`TargetConfig.problems`, and a budget in parameters that the released code's choices cannot keep."""
        found, options = super().problems(adapter), self.options()
        if self.budget_unit == "parameters" and (options.ties != "exact" or options.normalisation == "released"):
            found.append(
                "method.budget_unit=parameters needs method.ties=exact and a method.normalisation other than released, "
                "which compares shares within a matrix (both come from the preset, if they are not set)"
            )
        return found

    @property
    def keeps_rates(self) -> bool:
        return self.preset == "reference"

    def options(self) -> SalientOptions:
        """The preset's options, overridden by the options that are set explicitly."""
        preset = SALIENT_PRESETS[self.preset]
        chosen: dict[str, Any] = {}
        for field in fields(SalientOptions):
            own = getattr(self, field.name)
            chosen[field.name] = getattr(preset, field.name) if own is None else own
        return SalientOptions(**chosen)

    def plan(self, layout: RankLayout, total_steps: int) -> AllocationPlan:
        """The numbers behind the events: totals, warm-ups, windows.

        Raises:
            ValueError: see :class:`AllocationPlan` and :func:`steps_or_fraction`.
        """
        return AllocationPlan(
            total_steps=total_steps,
            initial_total=layout.total,
            target_total=self.wanted_total(len(layout.ranks)),
            initial_warmup=warmup_steps(self.initial_warmup, 0.1, self.preset, total_steps),
            final_warmup=warmup_steps(self.final_warmup, 0.3, self.preset, total_steps),
            window_initial=self.window_initial,
            window_final=self.window_final,
        )

    def events(self, layout: RankLayout, total_steps: int, steps_per_epoch: int | None = None) -> list[Event]:
        """An event at the end of every window, the last one at the end of the allocation phase."""
        options = self.options()
        schedule = paper_schedule if options.schedule == "paper" else reference_schedule
        return schedule(self.plan(layout, total_steps), options.final_prune)

    def final_total(self, layout: RankLayout, total_steps: int) -> int:
        """The target."""
        return self.plan(layout, total_steps).target_total

    def statistics_bytes(self, layout: RankLayout) -> int:
        """The longest window, in fp32."""
        return 4 * layout.total * self.window_final

    def event_bytes(self, layout: RankLayout) -> int:
        """A gathered copy of the window, its double-precision form and temporaries, and one block of the influence's
        solve."""
        return _EVENT_BYTES_PER_VALUE * layout.total * self.window_final + _EVENT_BLOCK

    def event_traffic(self, layout: RankLayout, elements: int) -> int:
        """The window in fp32, and with the influence graph at most 16 bytes per row for its blocks."""
        influence = self.score == "salience" and self.lambda_ < 1
        return (4 * self.window_final + 16 * influence) * layout.total

    def compaction_problem(self, when: Literal["last", "every"]) -> str | None:
        """``every`` requires that rows dropped after an event cannot matter to the next one."""
        if when == "last":
            return None
        options = self.options()
        wanted = {"apply_at": "now", "pruned_vectors": "zero", "nan_scores": "zero"}
        wrong = {key: getattr(options, key) for key, value in wanted.items() if getattr(options, key) != value}
        if not wrong:
            return None
        found = ", ".join(f"method.{key}={value}" for key, value in wrong.items())
        instead = ", ".join(f"method.{key}={wanted[key]}" for key in wrong)
        return (
            f"speed.compaction=every would change the training with {found} (from the preset, if not set): use last, "
            f"or {instead}"
        )

    def event_notes(self, events: Sequence[Event], target: int) -> list[str]:
        """A note if the last event does not reach the target, as with the released code's schedule."""
        notes = super().event_notes(events, target)
        if not events or events[-1].total_rank <= target:
            return notes
        return [
            *notes,
            f"the last event leaves {events[-1].total_rank} ranks, above the target {target}: "
            "set method.final_prune=true to end at the target",
        ]
