"""Options of HeteroLoRA. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, model_validator

from salient_ds.adapters.forms import AdapterForm
from salient_ds.heterolora.form import SwitchedForm
from salient_ds.heterolora.schedule import SearchSpace, largest_total, search_events
from salient_ds.methods.options import MethodConfig
from salient_ds.ranks import Event, RankLayout

if TYPE_CHECKING:
    from salient_ds.methods.duties import Method
    from salient_ds.salience.learning_rate import RatePlan


class HeteroLoRAConfig(MethodConfig):
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

    implementation: ClassVar[str] = "salient_ds.heterolora.method:HeteroLoRA"

    @property
    def takes_shortcuts(self) -> bool:
        """They compete with the linear layers."""
        return True

    def build(
        self,
        layout: RankLayout,
        total_steps: int,
        rates: RatePlan | None = None,
        steps_per_epoch: int | None = None,
    ) -> Method:
        """Events may be given in epochs."""
        method: Method = self._implementation()(self, layout, total_steps, steps_per_epoch)
        return method

    def adapter_form(self, num_matrices: int, rank: int, in_flight: bool = False) -> AdapterForm:
        """Whole modules that a mask switches."""
        return SwitchedForm()

    def events(self, layout: RankLayout, total_steps: int, steps_per_epoch: int | None = None) -> list[Event]:
        """Searches; each comes before the step that follows its own.

        Raises:
            ValueError: the budget is smaller than one module, or the events are in epochs of unknown length.
        """
        return search_events(self, SearchSpace.of(layout), total_steps, steps_per_epoch)

    def probe_batches_of(self, micro_batch_size: int) -> tuple[int, int] | None:
        """``probe_batches`` batches, of the training's size unless there is one of their own."""
        return self.probe_batches, self.probe_batch_size or micro_batch_size

    def final_total(self, layout: RankLayout, total_steps: int) -> int:
        """The largest sum of ranks that the budget allows."""
        return largest_total(self, SearchSpace.of(layout))

    def statistics_bytes(self, layout: RankLayout) -> int:
        """A copy of weights and moments of what is off."""
        if self.disabled_state == "decay":
            return 0
        return round(12 * (1 - self.keep) * self.adapter_parameters(layout))

    def event_bytes(self, layout: RankLayout) -> int:
        """Whole gradients in fp32, and whole weights for the proxies that multiply by them."""
        return (4 if self.proxy == "grad_norm" else 8) * self.adapter_parameters(layout)

    @property
    def replaces_weights(self) -> str | None:
        """SYNFLOW puts absolute values in their place."""
        return "method.proxy=synflow" if self.proxy == "synflow" else None
