"""Options of the rank-allocation methods, with presets where a paper and its released code disagree. No torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Method(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


@dataclass(frozen=True)
class SalientOptions:
    """Every point where the SalientLoRA paper (Ke et al., NeurIPS 2024) and its released code disagree."""

    schedule: Literal["paper", "reference"]
    """paper: n_t and n_f count the allocation phase only; reference: the code's denominator n_i + n_f."""
    final_prune: bool
    """A last event at the end of the allocation phase that leaves exactly the target budget."""
    leaf_influence: float
    """Influence reported for a value with no out-edge: 1 (paper) or 0 (code)."""
    combine: Literal["mix", "sum"]
    """mix: lambda * magnitude + (1 - lambda) * influence (paper); sum: plain sum (code)."""
    normalisation: Literal["printed", "released", "robust"]
    """printed: none; released: magnitude per module, influence over all values; robust: percentiles over live values.

    The paper does not state one. robust is its preset's choice because it recovers planted ranks (recall 0.99), which
    the released one does not (0.85): eval/records/2026-11-22_planted-rank_16-cpu-cores."""
    magnitude: Literal["absolute", "signed"]
    """|sigma| (code) or sigma (as printed in the paper)."""
    loss_weights: Literal["per_module", "global"]
    """Weigh a value's history by its own matrix' orthogonality loss (paper) or by the global one (code)."""
    apply_at: Literal["now", "next_step"]
    """When a decision takes effect: right after the event (paper) or after the next optimizer step (code)."""
    ties: Literal["exact", "threshold"]
    """exact: budget met exactly, ties broken by (score, module, row); threshold: all values at the cut go (code)."""
    nan_scores: Literal["zero", "reference"]
    """zero: 0/0 counts as 0 and pruned rows are not ranked; reference: NaN ranks as the largest score and is masked."""
    pruned_vectors: Literal["zero", "train"]
    """zero: rows of A and B are zeroed and leave the regulariser (paper); train: only E is masked (code)."""


SALIENT_PRESETS: dict[str, SalientOptions] = {
    "paper": SalientOptions(
        schedule="paper", final_prune=True, leaf_influence=1.0, combine="mix", normalisation="robust",
        magnitude="absolute", loss_weights="per_module", apply_at="now", ties="exact", nan_scores="zero",
        pruned_vectors="zero",
    ),
    "reference": SalientOptions(
        schedule="reference", final_prune=False, leaf_influence=0.0, combine="sum", normalisation="released",
        magnitude="absolute", loss_weights="global", apply_at="next_step", ties="threshold", nan_scores="reference",
        pruned_vectors="train",
    ),
}  # fmt: skip


class SalientLoRAConfig(_Method):
    name: Literal["salientlora"] = "salientlora"
    preset: Literal["paper", "reference"] = "paper"
    """Starting point of the options below; any of them that is set here wins over the preset."""
    target_rank: float | None = Field(None, gt=0)
    """Mean rank per matrix at the end of allocation."""
    target_total: int | None = Field(None, gt=0)
    """Instead of target_rank: the total number of singular values kept."""
    initial_warmup: float = Field(0, ge=0)
    """Steps before allocation starts (n_i; a fraction of all steps if below 1)."""
    final_warmup: float = Field(0, ge=0)
    """Steps after allocation ends (a fraction of all steps if below 1)."""
    window_initial: int = Field(10, ge=2)
    """First window length T_i (steps)."""
    window_final: int = Field(200, ge=2)
    """Last window length T_f (steps)."""
    beta: float = Field(0.9, gt=0, le=1)
    """Correlation threshold of a dependency."""
    gamma: float = 2.0
    """Slope threshold of a dependency; must be above 1."""
    lambda_: float = Field(0.7, ge=0, le=1, alias="lambda")
    """Share of the magnitude in the mixed score."""
    schedule: Literal["paper", "reference"] | None = None
    final_prune: bool | None = None
    leaf_influence: Literal[0, 1] | None = None
    combine: Literal["mix", "sum"] | None = None
    normalisation: Literal["printed", "released", "robust"] | None = None
    magnitude: Literal["absolute", "signed"] | None = None
    loss_weights: Literal["per_module", "global"] | None = None
    apply_at: Literal["now", "next_step"] | None = None
    ties: Literal["exact", "threshold"] | None = None
    nan_scores: Literal["zero", "reference"] | None = None
    pruned_vectors: Literal["zero", "train"] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> SalientLoRAConfig:
        if self.gamma <= 1:
            raise ValueError(
                f"method.gamma={self.gamma:g} must be above 1: only then does the variance grow along every edge, so "
                "that the dependency graph has no cycle and the influence is defined (the paper uses 2)"
            )
        if (self.target_rank is None) == (self.target_total is None):
            raise ValueError("set exactly one of method.target_rank (mean per matrix) and method.target_total")
        if self.window_final < self.window_initial:
            raise ValueError(
                f"method.window_final={self.window_final} is below method.window_initial={self.window_initial}: "
                "windows grow during training, swap or raise them"
            )
        return self

    def options(self) -> SalientOptions:
        """The preset's options, overridden by those that are set explicitly."""
        preset = SALIENT_PRESETS[self.preset]
        chosen: dict[str, Any] = {}
        for field in fields(SalientOptions):
            own = getattr(self, field.name)
            chosen[field.name] = getattr(preset, field.name) if own is None else own
        return SalientOptions(**chosen)


@dataclass(frozen=True)
class SensitivityOptions:
    """Every point where the AdaLoRA paper (Zhang et al., ICLR 2023) and its released code disagree about decisions.

    LoRA^2's code is a copy of AdaLoRA's in these. (A third point, the form of the penalty, is
    ``adapter.orthogonality.form``.)
    """

    moment: Literal["paper", "reference"]
    """Weight in |weight * gradient|: where the gradient was taken (paper), or after the step (code)."""
    ties: Literal["exact", "threshold"]
    """exact: budget met exactly, the lower row wins a tie; threshold: all values at the cut go (code)."""


SENSITIVITY_PRESETS: dict[str, SensitivityOptions] = {
    "standard": SensitivityOptions(moment="reference", ties="exact"),
    "paper": SensitivityOptions(moment="paper", ties="exact"),
    "reference": SensitivityOptions(moment="reference", ties="threshold"),
}


class _BySensitivity(_Method):
    """What AdaLoRA and LoRA^2 have in common: the smoothed sensitivity and the cubic budget."""

    preset: Literal["standard", "paper", "reference"] = "standard"
    """Starting point of `moment` and `ties`: standard is the released code with budgets met exactly."""
    target_rank: float | None = Field(None, gt=0)
    """Mean rank per matrix at the end of allocation; equal to adapter.rank it prunes nothing (LoRA in SVD form)."""
    target_total: int | None = Field(None, gt=0)
    """Instead of target_rank: the total number of singular values kept."""
    initial_warmup: float = Field(0, ge=0)
    """Steps before the budget starts to fall (t_i; a fraction of all steps if below 1)."""
    final_warmup: float = Field(0, ge=0)
    """Steps at the end with fixed ranks (t_f; a fraction of all steps if below 1)."""
    interval: int = Field(10, ge=1)
    """Steps between allocations (Delta_T; the AdaLoRA paper uses 1, 10 or 100 by task)."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Decay of the smoothed sensitivity."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Decay of the smoothed deviation from it (uncertainty)."""
    moment: Literal["paper", "reference"] | None = None
    ties: Literal["exact", "threshold"] | None = None

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.target_rank is None) == (self.target_total is None):
            raise ValueError("set exactly one of method.target_rank (mean per matrix) and method.target_total")
        return self

    def options(self) -> SensitivityOptions:
        """The preset's options, overridden by those that are set explicitly."""
        preset = SENSITIVITY_PRESETS[self.preset]
        return SensitivityOptions(self.moment or preset.moment, self.ties or preset.ties)


class AdaLoRAConfig(_BySensitivity):
    name: Literal["adalora"] = "adalora"


class LoRA2Config(_BySensitivity):
    name: Literal["lora2"] = "lora2"
    inner_width: int = Field(8, ge=1)
    """Width k of the two outer factors, which all ranks share; bounds the rank of an update (released code: 8)."""

    def parameters(self, in_features: int, out_features: int, rank: int) -> int:
        """Trainable elements of one adapter: k (in + out) + 2 k r + r."""
        return self.inner_width * (in_features + out_features + 2 * rank) + rank


class IncreLoRAConfig(_Method):
    name: Literal["increlora"] = "increlora"
    target_rank: float | None = Field(None, gt=0)
    """Mean rank per matrix at which growth ends; a single matrix grows to adapter.rank at the most."""
    target_total: int | None = Field(None, gt=0)
    """Instead of target_rank: the total number of singular values at which growth ends."""
    start_rank: int = Field(1, ge=1)
    """Rank of every matrix at the start (1 in all released scripts)."""
    initial_warmup: float = Field(0, ge=0)
    """Steps before ranks may grow (a fraction of all steps if below 1); the scripts use one interval."""
    interval: int = Field(100, ge=1)
    """Steps between events (100 to 1000 in the scripts, by task)."""
    top_h: int = Field(ge=1)
    """Matrices that grow at an event (2 to 22 in the scripts, by task and target)."""
    add: int | None = Field(None, ge=1)
    """Rows that a matrix gains at once; by default 1, 2, 3 or 4 for a target_rank of 2, 4, 6 or 8."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Decay of the smoothed score."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Decay of the smoothed deviation from it (uncertainty)."""
    ties: Literal["exact", "threshold"] = "exact"
    """exact: growth stops at the target, the earlier matrix wins a tie; threshold: all at the threshold grow (code)."""
    advance_learning: bool = True
    """Rows train with a singular value of 1e-5 before they count (the next `add` rows of every matrix)."""
    lr_restart: bool = True
    """Rows that join get their own warm-up and decay; false: they follow the learning rate of all others."""
    score_reduction: Literal["auto", "mean", "exact"] = "auto"
    """exact: score of the averaged gradient, at the cost of 4 bytes of traffic per adapted weight and scored step, and
    only without gradient accumulation; mean: scores of single processes and micro-batches, averaged; auto: exact where
    a step has one micro-batch on a process, else mean."""
    score_every: int = Field(1, ge=1)
    """Steps between two scores; each costs as much as the adapted layers' forward pass (exact: and its traffic)."""
    block_bytes: int = Field(64 * 2**20, gt=0)
    """Memory for the blocks of a matrix' gradient and update while it is scored."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.target_rank is None) == (self.target_total is None):
            raise ValueError("set exactly one of method.target_rank (mean per matrix) and method.target_total")
        return self


class HeteroLoRAConfig(_Method):
    """Whole modules on or off (Zhang et al. 2024), decided from gradients of a few probe batches.

    The released scripts use GRAD-NORM, 32 batches, a quarter on (a third for LLaMA), every 0.2 or 0.25 of an epoch.
    """

    name: Literal["heterolora"] = "heterolora"
    proxy: Literal["constant", "grad_norm", "snip", "synflow", "alpha_test", "fisher"] = "grad_norm"
    """How a module is scored; fisher is named by the released code but not written there."""
    mode: Literal["off", "combined", "separated"] = "combined"
    """LoRA and shortcut modules in one ranking, in one each, or LoRA alone (off: shortcuts stay on)."""
    keep: float = Field(0.25, gt=0, le=1)
    """Share of the modules (or of their parameters) that is on."""
    budget_unit: Literal["modules", "params"] = "modules"
    interval: float = Field(0.2, gt=0)
    """Distance of two events in `interval_unit`; the first comes before the first step."""
    interval_unit: Literal["epochs", "steps"] = "epochs"
    constant_epochs: float = Field(0, ge=0)
    """Epochs at the start in which all scores are equal, so that modules are drawn (released LLaMA code: 2)."""
    search_end: float = Field(1.0, gt=0, le=1)
    """Share of the run after which no event comes any more (released code: 1)."""
    probe_batches: int = Field(32, ge=1)
    """Batches of an event: the first ones of the training data in their own order, the same at every event."""
    probe_batch_size: int | None = Field(None, ge=1)
    """Examples of a probe batch (default: train.micro_batch_size)."""
    scale_free: bool = False
    """Divide a module's scaling alpha / r out of its score, which otherwise decides between kinds of modules."""
    degenerate: Literal["grad_norm", "refuse"] = "grad_norm"
    """If all scores are 0, as SNIP's and SYNFLOW's while B = 0: rank that event by GRAD-NORM, or stop."""
    disabled_state: Literal["freeze", "decay", "reset"] = "freeze"
    """freeze: weights, moments and step count of a module stand still while it is off (released code); decay: the
    optimizer goes on with zero gradients; reset: B, both moments and the count become 0 when it is switched off."""
    tolerance: float = Field(0.01, gt=0)
    """ALPHA-TEST: relative rise of the perplexity that still passes."""
    tie_seed: int = 0
    """Seed of the generator that draws among equal scores."""

    @property
    def counts_epochs(self) -> bool:
        """Whether the events depend on how many steps an epoch has."""
        return self.interval_unit == "epochs" or self.constant_epochs > 0

    @model_validator(mode="after")
    def _whole_steps(self) -> Self:
        if self.interval_unit == "steps" and self.interval != int(self.interval):
            raise ValueError(
                f"method.interval={self.interval:g} with interval_unit=steps must be whole: "
                "round it, or give a share of an epoch with interval_unit=epochs"
            )
        return self


class LoRAConfig(_Method):
    name: Literal["lora"] = "lora"
    form: Literal["plain", "svd"] = "plain"
    """plain: B A with B = 0 at the start (LoRA); svd: B diag(E) A with E = 0, the same form as the adaptive methods."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (rank-stabilised LoRA) instead of alpha / r."""


MethodConfig = SalientLoRAConfig | AdaLoRAConfig | LoRA2Config | IncreLoRAConfig | HeteroLoRAConfig | LoRAConfig
