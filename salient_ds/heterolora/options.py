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
    """Switches whole modules on or off (Zhang et al. 2024), based on gradients of a few probe batches.

    The released scripts use GRAD-NORM and 32 batches. They keep a quarter of the modules on (a third for LLaMA), and
    have an event every 0.2 or 0.25 epochs.
    """

    name: Literal["heterolora"] = "heterolora"
    proxy: Literal["constant", "grad_norm", "snip", "synflow", "alpha_test", "fisher"] = "grad_norm"
    """How modules are scored. The released code names fisher but does not implement it."""
    mode: Literal["off", "combined", "separated"] = "combined"
    """combined: one ranking of LoRA and shortcut modules. separated: one ranking of each kind. off: only LoRA modules
    are ranked, and all shortcuts stay on."""
    keep: float = Field(0.25, gt=0, le=1)
    """Share of the modules (or of their parameters, see `budget_unit`) that stays on after an event."""
    budget_unit: Literal["modules", "params"] = "modules"
    interval: float = Field(0.2, gt=0)
    """Distance between two events, in `interval_unit`. The first event comes before the first step."""
    interval_unit: Literal["epochs", "steps"] = "epochs"
    constant_epochs: float = Field(0, ge=0)
    """Number of epochs at the start in which modules are drawn at random instead of scored (released LLaMA code: 2)."""
    search_end: float = Field(1.0, gt=0, le=1)
    """There are no events after this share of the run (released code: 1)."""
    probe_batches: int = Field(32, ge=1)
    """Number of probe batches per event, over all processes. Every event uses the same ones: the first batches of the
    unshuffled training data."""
    probe_batch_size: int | None = Field(None, ge=1)
    """Examples per probe batch (default: train.micro_batch_size)."""
    scale_free: bool = False
    """Divide each score by the module's scaling alpha / r. Otherwise kinds of modules with a larger scaling are
    favoured."""
    degenerate: Literal["grad_norm", "refuse"] = "grad_norm"
    """What to do while snip, synflow or fisher cannot rank the modules, because they are 0 for every module whose B is
    still 0. grad_norm: rank that event by GRAD-NORM. refuse: stop with an error."""
    disabled_state: Literal["freeze", "decay", "reset"] = "freeze"
    """What happens to a module while it is off. freeze: its weights, moments and step count do not change (released
    code). decay: the optimizer continues with zero gradients. reset: as freeze, but B, both moments and the step count
    are set to 0 when the module is switched off."""
    tolerance: float = Field(0.01, gt=0)
    """alpha_test: a module may be weakened until the perplexity exceeds p + tolerance / p, where p is the perplexity
    with all modules at full strength (released code)."""
    tie_seed: int = 0
    """Seed of the generator that draws among equal scores."""

    @property
    def counts_epochs(self) -> bool:
        """Whether the events depend on the number of steps per epoch."""
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
    packable: ClassVar[bool] = True
    compilable: ClassVar[bool] = True

    @property
    def takes_shortcuts(self) -> bool:
        """Shortcuts compete with the linear layers."""
        return True

    def build(
        self,
        layout: RankLayout,
        total_steps: int,
        rates: RatePlan | None = None,
        steps_per_epoch: int | None = None,
    ) -> Method:
        """Build the method. ``steps_per_epoch`` is needed if the options count in epochs."""
        method: Method = self._implementation()(self, layout, total_steps, steps_per_epoch)
        return method

    def adapter_form(self, num_matrices: int, rank: int, in_flight: bool = False) -> AdapterForm:
        """Adapters that a mask switches on and off as a whole."""
        return SwitchedForm()

    def events(self, layout: RankLayout, total_steps: int, steps_per_epoch: int | None = None) -> list[Event]:
        """The searches of the run. One with ``step`` s is taken after s applied steps, before step s + 1.

        Raises:
            ValueError: the budget is smaller than one module, or the interval is given in epochs and
                ``steps_per_epoch`` is None.
        """
        return search_events(self, SearchSpace.of(layout), total_steps, steps_per_epoch)

    def probe_batches_of(self, micro_batch_size: int) -> tuple[int, int] | None:
        """Number and size of the probe batches. The size defaults to the micro-batch size of training."""
        return self.probe_batches, self.probe_batch_size or micro_batch_size

    def final_total(self, layout: RankLayout, total_steps: int) -> int:
        """The largest sum of ranks that the budget allows."""
        return largest_total(self, SearchSpace.of(layout))

    def statistics_bytes(self, layout: RankLayout) -> int:
        """Copies of weights and moments of the modules that are off."""
        if self.disabled_state == "decay":
            return 0
        return round(12 * (1 - self.keep) * self.adapter_parameters(layout))

    def event_bytes(self, layout: RankLayout) -> int:
        """Upper bound: whole gradients in fp32, and whole fp32 weights unless the proxy is grad_norm."""
        return (4 if self.proxy == "grad_norm" else 8) * self.adapter_parameters(layout)

    def event_traffic(self, layout: RankLayout, elements: int) -> int:
        """The probes' gradients in fp32, a score per module in fp64, and the loss that scales them."""
        return 4 * elements + 8 * len(layout.ranks) + 16

    @property
    def replaces_weights(self) -> str | None:
        """The option that replaces weights while the model runs: SYNFLOW uses their absolute values."""
        return "method.proxy=synflow" if self.proxy == "synflow" else None
