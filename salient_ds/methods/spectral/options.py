"""Options of the method spectral. No torch."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from salient_ds.adapters.forms import AdapterForm, PlainForm
from salient_ds.methods.options import TargetConfig
from salient_ds.ranks import Event, RankLayout
from salient_ds.salience.budget import AllocationPlan
from salient_ds.steps import steps_or_fraction


class SpectralConfig(TargetConfig):
    name: Literal["spectral"] = "spectral"
    prune_at: list[float] = [0.1]
    """When rows are removed: steps, or fractions of all steps below 1, rising. With several events the total rank falls
    by the same factor at each of them. Early is better and cheaper: most of the run then trains the ranks that stay
    (eval/records/*evidence*)."""
    score: Literal["energy", "curvature", "gate_fisher", "random"] = "curvature"
    """What a row is kept for. energy: its squared singular value. curvature: the same, weighted with Adam's second
    moments, an estimate of what its removal costs. gate_fisher: the mean over `window` steps of
    (sigma dL/dsigma)^2; rows are rotated once before that. random: a draw, as a control for comparisons."""
    compete: Literal["everywhere", "in_matrix"] = "everywhere"
    """Which rows compete for the budget. everywhere: those of all matrices. in_matrix: only those of the same matrix,
    so that all matrices end with the same rank, as a control for comparisons."""
    window: int = Field(20, ge=1)
    """Steps that `score: gate_fisher` averages over, right before every event."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (rank-stabilised LoRA) instead of alpha / r."""

    implementation: ClassVar[str] = "salient_ds.methods.spectral.method:Spectral"
    packable: ClassVar[bool] = True
    compilable: ClassVar[bool] = True
    compactable: ClassVar[Literal["never", "last", "every"]] = "every"

    @field_validator("prune_at", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return value if isinstance(value, list | tuple) else [value]

    @field_validator("prune_at")
    @classmethod
    def _some(cls, value: list[float]) -> list[float]:
        if not value:
            raise ValueError("method.prune_at is empty: give at least one step, or a fraction of all steps")
        return value

    def adapter_form(self, num_matrices: int, rank: int, in_flight: bool = False) -> AdapterForm:
        """B A, as LoRA."""
        return PlainForm(self.rslora)

    def events(self, layout: RankLayout, total_steps: int, steps_per_epoch: int | None = None) -> list[Event]:
        """The events that prune. With ``score: gate_fisher``, one that only rotates comes ``window`` steps before each.

        Raises:
            ValueError: the target or a step is out of bounds, or the windows overlap.
        """
        target = self.wanted_total(len(layout.ranks))
        plan = AllocationPlan(total_steps, layout.total, target)
        if plan.target_total == plan.initial_total:
            return []
        steps = [steps_or_fraction(value, total_steps) for value in self.prune_at]
        watched = self.window if self.score == "gate_fisher" else 0
        before = 0
        events: list[Event] = []
        for index, step in enumerate(steps):
            if step - watched <= before or step > total_steps:
                raise ValueError(self._misplaced(step, before, watched, total_steps))
            share = (index + 1) / len(steps)
            budget = round(layout.total ** (1 - share) * target**share)
            if watched:
                kept = events[-1].total_rank if events else layout.total
                events.append(Event(step - watched, kept, step - watched, 1))
            events.append(Event(step, budget, step - watched + 1 if watched else step, max(1, watched)))
            before = step
        return events

    def _misplaced(self, step: int, before: int, watched: int, total_steps: int) -> str:
        window = f" after a window of {watched} steps (method.window)" if watched else ""
        return (
            f"method.prune_at={self.prune_at}: an event at step {step}{window} does not fit between step {before} and "
            f"the end of training at step {total_steps}: give rising steps, or fractions of all steps"
        )

    def final_total(self, layout: RankLayout, total_steps: int) -> int:
        """The target."""
        return self.wanted_total(len(layout.ranks))

    def statistics_bytes(self, layout: RankLayout) -> int:
        """A few float64 numbers per row."""
        return 32 * layout.total

    def event_bytes(self, layout: RankLayout) -> int:
        """A group of matrices with their moments (128 MiB, or the largest one), twice, and one of them in float64."""
        sides = zip(layout.in_features, layout.out_features, layout.ranks, strict=True)
        largest = 3 * max(rank * (wide + tall) for wide, tall, rank in sides)
        return 8 * max(2**25, largest) + 4 * 8 * largest
