"""Options of IncreLoRA. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field

from salient_ds.adapters.forms import AdapterForm, GrowingForm, SVDForm
from salient_ds.methods.increlora import growth
from salient_ds.methods.increlora.growth import GrowthPlan, default_add, growth_events, headroom
from salient_ds.methods.options import TargetConfig
from salient_ds.ranks import Event, RankLayout
from salient_ds.steps import steps_or_fraction

if TYPE_CHECKING:
    from salient_ds.adapters.options import AdapterConfig
    from salient_ds.methods.duties import Method
    from salient_ds.salience.learning_rate import RatePlan


class IncreLoRAConfig(TargetConfig):
    name: Literal["increlora"] = "increlora"
    target_rank: float | None = Field(None, gt=0)
    """Mean rank per matrix at which growth ends. A single matrix grows to adapter.rank at most."""
    target_total: int | None = Field(None, gt=0)
    """Alternative to target_rank: the total number of singular values at which growth ends."""
    start_rank: int = Field(1, ge=1)
    """Rank of every matrix at the start (1 in all released scripts)."""
    initial_warmup: float = Field(0, ge=0)
    """Steps before ranks may grow. A value below 1 is a fraction of all steps. Released scripts use one interval."""
    interval: int = Field(100, ge=1)
    """Steps between events (100 to 1000 in the released scripts, by task)."""
    top_h: int = Field(ge=1)
    """Number of matrices that grow at an event (2 to 22 in the released scripts, by task and target)."""
    add: int | None = Field(None, ge=1)
    """Rows that a matrix gains at once. Default: 1, 2, 3 or 4 for a mean target rank of 2, 4, 6 or 8."""
    beta1: float = Field(0.85, gt=0, lt=1)
    """Decay of the smoothed score."""
    beta2: float = Field(0.85, gt=0, lt=1)
    """Decay of the smoothed uncertainty, the deviation from the smoothed score."""
    ties: Literal["exact", "threshold"] = "exact"
    """exact: growth stops exactly at the target; in a tie, the earlier matrix grows. threshold: all matrices at the
    threshold grow (released code)."""
    advance_learning: bool = True
    """Train the next `add` rows of every matrix before they are activated, with a singular value of 1e-5."""
    lr_restart: bool = True
    """Rows that join late get their own learning-rate warm-up and decay. false: they follow the rate of all others."""
    score_reduction: Literal["auto", "mean", "exact"] = "auto"
    """How scores are combined. exact: the averaged gradient is scored. This costs 4 bytes of traffic per adapted weight
    and scored step, and does not work with gradient accumulation. mean: every process and micro-batch is scored by
    itself, and the scores are averaged. auto: exact if a step has one micro-batch on a process, else mean."""
    score_every: int = Field(1, ge=1)
    """Steps between two scores. A score costs as much as the adapted layers' forward pass (exact: plus its traffic)."""
    block_bytes: int = Field(64 * 2**20, gt=0)
    """Bytes for the blocks of a matrix's gradient and update while it is scored."""

    implementation: ClassVar[str] = "salient_ds.methods.increlora.method:IncreLoRA"
    packable: ClassVar[bool] = True
    compactable: ClassVar[Literal["never", "last", "every"]] = "last"
    grows: ClassVar[bool] = True

    @property
    def scoring_bytes(self) -> int:
        """The blocks of a matrix's gradient and update."""
        return self.block_bytes

    def build(
        self,
        layout: RankLayout,
        total_steps: int,
        rates: RatePlan | None = None,
        steps_per_epoch: int | None = None,
    ) -> Method:
        """Create the method. It needs the learning-rate schedule for rows that join late."""
        method: Method = self._implementation()(self, layout, total_steps, rates)
        return method

    @classmethod
    def suggested(cls, num_matrices: int, total_steps: int, target_rank: float) -> dict[str, tuple[int | float, str]]:
        """Growth in at most 24 events that ends at half of the steps, as far as so many matrices can grow at once."""
        return growth.suggested(num_matrices, total_steps, target_rank, cls.model_fields["start_rank"].default)

    def adapter_form(self, num_matrices: int, rank: int, in_flight: bool = False) -> AdapterForm:
        """Rows are active, in reserve, or off.

        Raises:
            ValueError: no default for ``method.add``.
        """
        return GrowingForm(
            start_rank=self.start_rank,
            reserve=self.reserve_rows(num_matrices),
            room=self.first_room(num_matrices, rank) if in_flight else None,
        )

    def event_traffic(self, layout: RankLayout, elements: int) -> int:
        """Nothing but digests: scores are summed in the steps before."""
        return 0

    def step_traffic(self, layout: RankLayout, accumulation: int) -> int:
        """A score per matrix in fp64; if exact, the gradients of all adapted weights in fp32 too."""
        exact = self.score_reduction == "exact" or (self.score_reduction == "auto" and accumulation == 1)
        weights = sum(wide * tall for wide, tall in zip(layout.in_features, layout.out_features, strict=True))
        return 8 * len(layout.ranks) + (4 * weights if exact else 0)

    def adapter_parameters(self, layout: RankLayout, ranks: Sequence[float] | None = None) -> int:
        """As for SVD adapters: the reserve does not change the count."""
        sides = zip(layout.in_features, layout.out_features, ranks or layout.ranks, strict=True)
        return round(sum(SVDForm().parameters(wide, tall, rank) for wide, tall, rank in sides))

    def rows_added(self, num_matrices: int) -> int:
        """Rows that a matrix gains at once.

        Raises:
            ValueError: no default for ``method.add``.
        """
        return self.add or default_add(self.wanted_total(num_matrices) / num_matrices)

    def reserve_rows(self, num_matrices: int) -> int:
        """Rows of a matrix that train before they are activated, while growth continues: as many as ``add``."""
        return self.rows_added(num_matrices) if self.advance_learning else 0

    def plan(self, layout: RankLayout, total_steps: int) -> GrowthPlan:
        """The numbers behind the events.

        Raises:
            ValueError: see :class:`GrowthPlan` and :func:`steps_or_fraction`; no default for ``method.add``.
        """
        return GrowthPlan(
            total_steps=total_steps,
            ranks=layout.ranks,
            start_rank=self.start_rank,
            target_total=self.wanted_total(len(layout.ranks)),
            initial_warmup=steps_or_fraction(self.initial_warmup, total_steps),
            interval=self.interval,
            top_h=self.top_h,
            add=self.rows_added(len(layout.ranks)),
            exact=self.ties == "exact",
        )

    def problems(self, adapter: AdapterConfig) -> list[str]:
        """As :meth:`TargetConfig.problems`, and a budget in parameters: growth counts rows, whatever they cost."""
        found = super().problems(adapter)
        if self.budget_unit == "parameters":
            found.append("method.budget_unit=parameters works with methods that prune, not with increlora: remove it")
        return found

    def events(self, layout: RankLayout, total_steps: int, steps_per_epoch: int | None = None) -> list[Event]:
        """One event every ``interval`` steps until the target is reached."""
        return growth_events(self.plan(layout, total_steps))

    def initial_total(self, layout: RankLayout) -> int:
        """``start_rank`` rows of every matrix."""
        return self.start_rank * len(layout.ranks)

    def final_total(self, layout: RankLayout, total_steps: int) -> int:
        """The target."""
        return self.plan(layout, total_steps).target_total

    def first_room(self, num_matrices: int, rank: int) -> int:
        """The active rows at the start, the reserve, and headroom for the first events."""
        start, add = self.start_rank, self.rows_added(num_matrices)
        left = max(0, self.wanted_total(num_matrices) - start * num_matrices)
        return min(rank, start + self.reserve_rows(num_matrices) + headroom(start, add, left))

    def largest_rooms(self, layout: RankLayout, multiple: int) -> list[int]:
        """Assumes that all growth happens in the widest matrices. Every matrix has its reserve and headroom."""
        count = len(layout.ranks)
        return growth.largest_rooms(
            widths_M=[wide + tall + 1 for wide, tall in zip(layout.in_features, layout.out_features, strict=True)],
            most=max(layout.ranks),
            start=self.start_rank,
            add=self.rows_added(count),
            reserve=self.reserve_rows(count),
            target=self.wanted_total(count),
            multiple=multiple,
        )

    def statistics_bytes(self, layout: RankLayout) -> int:
        """A copy of the rows that joined late: at most all rows."""
        return 4 * self.adapter_parameters(layout) if self.lr_restart else 0

    def exact_scores(self, accumulation: int) -> bool:
        """Whether the averaged gradient is scored (exact), instead of averaging scores.

        ``auto`` is exact if a step has one micro-batch on a process (``accumulation`` 1).

        Raises:
            ValueError: ``exact`` with gradient accumulation. The gradient then comes in pieces, none of which is kept.
        """
        if self.score_reduction == "exact" and accumulation > 1:
            raise ValueError(
                "method.score_reduction=exact needs the gradient of a whole step at once, but a step has "
                f"{accumulation} micro-batches on a process: set method.score_reduction=mean, or raise "
                "train.micro_batch_size (or the number of processes) until train.global_batch_size = "
                "micro_batch_size x processes"
            )
        return self.score_reduction == "exact" or (self.score_reduction == "auto" and accumulation == 1)

    def batch_facts(self, accumulation: int) -> tuple[dict[str, Any], list[str]]:
        """Reports how the scores of a step's micro-batches are combined."""
        exact = self.exact_scores(accumulation)
        kind = "exact, of the averaged gradient" if exact else "mean, over micro-batches"
        return {"exact_scores": exact}, [f"method.score_reduction={self.score_reduction}: scores are {kind}"]

    def resolved(self, accumulation: int) -> Self:
        """Says which ``score_reduction`` "auto" stands for."""
        return self.model_copy(update={"score_reduction": "exact" if self.exact_scores(accumulation) else "mean"})
