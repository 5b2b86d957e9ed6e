"""What a method's options answer before torch is loaded: events, totals, adapter form, memory, capabilities.

``check``, the memory estimate, injection and the speed plan ask these questions and know no method by name. If a method
does not declare a capability, ``salient-ds check`` notes that, and refuses a run file that asks for the capability.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from statistics import geometric_mean
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from salient_ds.adapters.forms import AdapterForm, SVDForm
from salient_ds.ranks import Event, RankLayout
from salient_ds.steps import steps_or_fraction
from salient_ds.strict import Strict

if TYPE_CHECKING:
    from salient_ds.adapters.options import AdapterConfig
    from salient_ds.methods.duties import Method
    from salient_ds.salience.learning_rate import RatePlan


class MethodConfig(Strict):
    """Section ``method`` of a run file. Every method has a subclass, which is found by its ``name``."""

    name: str

    implementation: ClassVar[str]
    """The class that decides, as "package.module:Class". It is imported only when a run is built."""
    packable: ClassVar[bool] = False
    """Whether factors may be packed in banks of a few layers each (``speed.packing``)."""
    compilable: ClassVar[bool] = False
    """Whether ``speed.compile_layers: auto`` compiles layers on GPUs."""
    compactable: ClassVar[Literal["never", "last", "every"]] = "never"
    """When pruned rows may be dropped: never, after the last event, or after every event (``speed.compaction``)."""
    grows: ClassVar[bool] = False
    """Whether events add rows instead of removing them (``speed.growth``)."""

    @property
    def takes_shortcuts(self) -> bool:
        """Whether ``adapter.shortcuts`` may be set."""
        return False

    @property
    def counts_epochs(self) -> bool:
        """Whether the events depend on the number of steps in an epoch."""
        return False

    @property
    def replaces_weights(self) -> str | None:
        """The option that makes the method replace weights while the model runs, or None.

        Compiled layers would not see such weights.
        """
        return None

    @property
    def scoring_bytes(self) -> int:
        """Bytes on each process for scoring whole matrices in backward passes; 0: no scoring."""
        return 0

    def build(
        self,
        layout: RankLayout,
        total_steps: int,
        rates: RatePlan | None = None,
        steps_per_epoch: int | None = None,
    ) -> Method:
        """Create the object that decides.

        Args:
            layout: all rows that may ever exist.
            total_steps: applied optimizer steps of the run.
            rates: the learning-rate schedule, for methods that give single rows their own learning rate.
            steps_per_epoch: for methods whose events are given in epochs.

        Raises:
            ValueError: the schedule has no event or contradicts itself. The message gives the numbers and the remedies.
        """
        return self._implementation()(self, layout, total_steps)

    def _implementation(self) -> Any:
        module, _, name = self.implementation.partition(":")
        return getattr(import_module(module), name)

    def adapter_form(self, num_matrices: int, rank: int, in_flight: bool = False) -> AdapterForm:
        """The form of the adapters around ``num_matrices`` layers.

        ``in_flight``: growing adapters start with a few rows, and more are allocated during training.
        """
        return SVDForm()

    def adapter_parameters(self, layout: RankLayout, ranks: Sequence[float] | None = None) -> int:
        """Number of trainable elements of all adapters. ``ranks``, which may be means, replaces the layout's ranks."""
        form = self.adapter_form(len(layout.ranks), max(layout.ranks, default=1))
        sides = zip(layout.in_features, layout.out_features, ranks or layout.ranks, strict=True)
        return round(sum(form.parameters(wide, tall, rank) for wide, tall, rank in sides))

    @classmethod
    def suggested(cls, num_matrices: int, total_steps: int, target_rank: float) -> dict[str, tuple[int | float, str]]:
        """Values for options that depend on the run, for ``salient-ds init``: key -> value and why, in a few words.

        Options without a default have to be among them, or init refuses the method. The keys do not depend on the
        arguments.
        """
        return {}

    @property
    def keeps_rates(self) -> bool:
        """Whether singular values learn at the rate of the factors unless ``train.sigma_lr`` says otherwise.

        Presets that repeat a released code do.
        """
        return False

    def sigma_ratio(self, layout: RankLayout, init_std: float) -> float:
        """What ``train.sigma_lr: auto`` stands for: the geometric mean over matrices of the form's ratios."""
        if self.keeps_rates or not layout.ranks:
            return 1.0
        form = self.adapter_form(len(layout.ranks), max(layout.ranks))
        sides = zip(layout.in_features, layout.out_features, strict=True)
        return geometric_mean([form.sigma_ratio(wide, tall, init_std) for wide, tall in sides])

    def events(self, layout: RankLayout, total_steps: int, steps_per_epoch: int | None = None) -> list[Event]:
        """All allocations of a run in order; empty if ranks are fixed.

        Raises:
            ValueError: ranks have to change, but the schedule has no event, or its numbers contradict each other.
        """
        return []

    def probe_batches_of(self, micro_batch_size: int) -> tuple[int, int] | None:
        """Number of probe batches per event, and examples in each; None: the method does not probe."""
        return None

    def initial_total(self, layout: RankLayout) -> int:
        """Sum of ranks before the first event."""
        return layout.total

    def final_total(self, layout: RankLayout, total_steps: int) -> int:
        """Sum of ranks at the end, or an upper bound of it.

        Raises:
            ValueError: the numbers of the schedule contradict each other.
        """
        return layout.total

    def first_room(self, num_matrices: int, rank: int) -> int:
        """Rows allocated for every matrix at the start, if more are allocated during training (methods that grow)."""
        return rank

    def largest_rooms(self, layout: RankLayout, multiple: int) -> list[int]:
        """Rows allocated for every matrix if growth takes its most memory-hungry course.

        The engine rounds the rows of a matrix up to a multiple of ``multiple``.
        """
        return list(layout.ranks)

    def statistics_bytes(self, layout: RankLayout) -> int:
        """Bytes of the method's statistics, on all processes together."""
        return 0

    def event_bytes(self, layout: RankLayout) -> int:
        """Bytes that an event needs on each process."""
        return 0

    def event_traffic(self, layout: RankLayout, elements: int) -> int:
        """Bytes that a process puts into the sums of an event: at most one score per row, fp64.

        Args:
            elements: trainable elements, for methods that send factors.
        """
        return 8 * layout.total

    def step_traffic(self, layout: RankLayout, accumulation: int) -> int:
        """Bytes that the method adds to the sums of a step without an event, at most."""
        return 0

    def problems(self, adapter: AdapterConfig) -> list[str]:
        """Contradictions between the method and section ``adapter``: one sentence each, with value and remedy."""
        return []

    def compaction_problem(self, when: Literal["last", "every"]) -> str | None:
        """Why dropping rows after the ``last`` or ``every`` event would change the training; None if it would not."""
        return None

    def batch_facts(self, accumulation: int) -> tuple[dict[str, Any], list[str]]:
        """Facts and notes for ``check`` that depend on ``accumulation``, the micro-batches of a step on one process.

        Raises:
            ValueError: the method cannot work with that many micro-batches.
        """
        return {}, []

    def resolved(self, accumulation: int) -> Self:
        """The options with every choice made that is left to ``accumulation``, see :meth:`batch_facts`.

        A run resumes only with equal resolved options.
        """
        return self

    def event_notes(self, events: Sequence[Event], target: int) -> list[str]:
        """What a user should know about the schedule before the run starts."""
        return []


def warmup_steps(chosen: float | None, standard: float, preset: str, total_steps: int) -> int:
    """A warm-up in steps. One that is not set is ``standard`` of the run with the preset standard, else 0."""
    if chosen is None:
        chosen = standard if preset == "standard" else 0.0
    return steps_or_fraction(chosen, total_steps)


class TargetConfig(MethodConfig):
    """Options of a method that ends at a given sum of ranks."""

    target_rank: float | None = Field(None, gt=0)
    """Mean rank per matrix at the end of allocation."""
    target_total: int | None = Field(None, gt=0)
    """Alternative to target_rank: the total number of singular values that are kept."""
    budget_unit: Literal["ranks", "parameters"] = "ranks"
    """What the target counts. ranks: rows of all matrices alike. parameters: as many parameters as adapters of that
    mean rank have if it is the same everywhere; rows are then compared by their gain per parameter, so the total rank
    may differ from the target."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.target_rank is None) == (self.target_total is None):
            raise ValueError("set exactly one of method.target_rank (mean per matrix) and method.target_total")
        return self

    def wanted_total(self, num_matrices: int) -> int:
        """The target: sum of ranks at the end of the run."""
        if self.target_total is not None:
            return self.target_total
        assert self.target_rank is not None
        return round(self.target_rank * num_matrices)

    def event_notes(self, events: Sequence[Event], target: int) -> list[str]:
        """A note that the total ranks of ``budget_unit: parameters`` are those of uniform adapters."""
        if self.budget_unit == "ranks" or not events:
            return []
        return ["method.budget_unit=parameters: total ranks are those of uniform adapters with as many parameters"]

    def problems(self, adapter: AdapterConfig) -> list[str]:
        """Reports a ``target_rank`` above ``adapter.rank``."""
        if self.target_rank is None or self.target_rank <= adapter.rank:
            return []
        return [
            f"method.target_rank={self.target_rank:g} is above adapter.rank={adapter.rank}: "
            "no more rows than that are allocated, so lower the target or raise it"
        ]
