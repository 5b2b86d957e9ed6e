"""What a method's options answer before torch is loaded: events, totals, adapter form, memory, capabilities.

``check``, the memory estimate, injection and the speed plan ask these questions and know no method by name. A
capability that a method does not declare is refused or noted by ``salient-ds check``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from salient_ds.adapters.forms import AdapterForm, SVDForm
from salient_ds.ranks import Event, RankLayout
from salient_ds.strict import Strict

if TYPE_CHECKING:
    from salient_ds.adapters.options import AdapterConfig
    from salient_ds.methods.duties import Method
    from salient_ds.salience.learning_rate import RatePlan


class MethodConfig(Strict):
    """Section ``method`` of a run file; one subclass per method, found by its ``name``."""

    name: str

    implementation: ClassVar[str]
    """The class that decides, as "package.module:Class". It is imported when a run is built."""
    packable: ClassVar[bool] = False
    """Factors may lie in banks of a few layers (``speed.packing``)."""
    compilable: ClassVar[bool] = False
    """Layers are compiled on GPUs without being asked (``speed.compile_layers: auto``)."""
    compactable: ClassVar[Literal["never", "last", "every"]] = "never"
    """Pruned rows may be dropped after the last event, or after every one (``speed.compaction``)."""
    grows: ClassVar[bool] = False
    """Events add rows instead of taking them away (``speed.growth``)."""

    @property
    def takes_shortcuts(self) -> bool:
        """Whether ``adapter.shortcuts`` may be set."""
        return False

    @property
    def counts_epochs(self) -> bool:
        """Whether the events depend on how many steps an epoch has."""
        return False

    @property
    def replaces_weights(self) -> str | None:
        """The option that makes the method replace weights while the model runs; compiled layers would not see it."""
        return None

    @property
    def scoring_bytes(self) -> int:
        """Memory on each process for scoring whole matrices in backward passes; 0: they are not scored."""
        return 0

    def build(
        self,
        layout: RankLayout,
        total_steps: int,
        rates: RatePlan | None = None,
        steps_per_epoch: int | None = None,
    ) -> Method:
        """The object that decides.

        Args:
            layout: all rows that there may be.
            total_steps: applied optimizer steps of the run.
            rates: the learning-rate schedule, for methods that give single rows their own.
            steps_per_epoch: for methods whose events are given in epochs.

        Raises:
            ValueError: the schedule has no event or contradicts itself, with the numbers and the ways out.
        """
        return self._implementation()(self, layout, total_steps)

    def _implementation(self) -> Any:
        module, _, name = self.implementation.partition(":")
        return getattr(import_module(module), name)

    def adapter_form(self, num_matrices: int, rank: int, in_flight: bool = False) -> AdapterForm:
        """The form of the adapters around ``num_matrices`` layers; ``in_flight``: rows are added while training."""
        return SVDForm()

    def adapter_parameters(self, layout: RankLayout, ranks: Sequence[float] | None = None) -> int:
        """Trainable elements of all adapters; ``ranks`` (they may be means) instead of the layout's."""
        form = self.adapter_form(len(layout.ranks), max(layout.ranks, default=1))
        sides = zip(layout.in_features, layout.out_features, ranks or layout.ranks, strict=True)
        return round(sum(form.parameters(wide, tall, rank) for wide, tall, rank in sides))

    def events(self, layout: RankLayout, total_steps: int, steps_per_epoch: int | None = None) -> list[Event]:
        """All allocations of a run in order; none for fixed ranks.

        Raises:
            ValueError: ranks have to go or come, but the schedule has no event, or its numbers contradict each other.
        """
        return []

    def probe_batches_of(self, micro_batch_size: int) -> tuple[int, int] | None:
        """Batches, and examples in each, that events before a step look at; None: the method does not probe."""
        return None

    def initial_total(self, layout: RankLayout) -> int:
        """Sum of ranks before the first event."""
        return layout.total

    def final_total(self, layout: RankLayout, total_steps: int) -> int:
        """Sum of ranks at the end, or the most that it can be.

        Raises:
            ValueError: the numbers of the schedule contradict each other.
        """
        return layout.total

    def first_room(self, num_matrices: int, rank: int) -> int:
        """Rows that every matrix begins with if room is made in flight (methods that grow)."""
        return rank

    def largest_rooms(self, layout: RankLayout, multiple: int) -> list[int]:
        """Rows of every matrix if growth goes to where it costs most memory; rooms are multiples of ``multiple``."""
        return list(layout.ranks)

    def statistics_bytes(self, layout: RankLayout) -> int:
        """Memory of the method's statistics on all processes together."""
        return 0

    def event_bytes(self, layout: RankLayout) -> int:
        """Memory that an event needs on each process."""
        return 0

    def problems(self, adapter: AdapterConfig) -> list[str]:
        """Contradictions between the method and section ``adapter``, one sentence each with value and remedy."""
        return []

    def compaction_problem(self, when: Literal["last", "every"]) -> str | None:
        """Why dropping rows then would change the training; None if it would not."""
        return None

    def batch_facts(self, accumulation: int) -> tuple[dict[str, Any], list[str]]:
        """Facts and notes for ``check`` that follow from the number of micro-batches of a step on one process.

        Raises:
            ValueError: the method cannot work with so many.
        """
        return {}, []

    def event_notes(self, events: Sequence[Event], target: int) -> list[str]:
        """What a user should know about the schedule before the run starts."""
        return []


class TargetConfig(MethodConfig):
    """Options of a method that ends at a total number of ranks."""

    target_rank: float | None = Field(None, gt=0)
    """Mean rank per matrix at the end of allocation."""
    target_total: int | None = Field(None, gt=0)
    """Instead of target_rank: the total number of singular values that are kept."""

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if (self.target_rank is None) == (self.target_total is None):
            raise ValueError("set exactly one of method.target_rank (mean per matrix) and method.target_total")
        return self

    def wanted_total(self, num_matrices: int) -> int:
        """Sum of ranks that the run is to end with."""
        if self.target_total is not None:
            return self.target_total
        assert self.target_rank is not None
        return round(self.target_rank * num_matrices)

    def problems(self, adapter: AdapterConfig) -> list[str]:
        """A target above the rank that every matrix starts with."""
        if self.target_rank is None or self.target_rank <= adapter.rank:
            return []
        return [
            f"method.target_rank={self.target_rank:g} is above adapter.rank={adapter.rank}: "
            "no more rows than that are allocated, so lower the target or raise it"
        ]
