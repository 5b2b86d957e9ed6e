"""Options of the method spectral. No torch."""

from __future__ import annotations

from itertools import pairwise
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from salient_ds.adapters.forms import AdapterForm, PlainForm
from salient_ds.methods.options import TargetConfig
from salient_ds.ranks import Event, RankLayout
from salient_ds.salience.budget import AllocationPlan
from salient_ds.steps import steps_or_fraction


class SpectralConfig(TargetConfig):
    name: Literal["spectral"] = "spectral"
    prune_at: list[float] | None = None
    """When rows are removed: steps, or fractions of all steps below 1, rising. With several events the total rank falls
    by the same factor at each of them. Default: [0.1, 0.2, 0.3, 0.4, 0.5]; fewer events, up to half of the run, if it
    has less than 40 steps. One early event ([0.1]) leaves more of the run at the speed of the final ranks."""
    score: Literal["energy", "curvature", "gate_fisher", "random"] = "gate_fisher"
    """What a row is kept for. gate_fisher: the mean over `window` steps of (sigma dL/dsigma)^2; rows are rotated once
    before that. curvature: its squared singular value, weighted with Adam's second moments, an estimate of what its
    removal costs; it needs no window. energy: its squared singular value. random: a draw, as a control for comparisons.
    """
    compete: Literal["everywhere", "in_matrix"] = "everywhere"
    """Which rows compete for the budget. everywhere: those of all matrices. in_matrix: only those of the same matrix,
    so that all matrices end with the same rank, as a control for comparisons."""
    window: float | None = Field(None, gt=0)
    """Steps, or a fraction of all steps below 1, that `score: gate_fisher` averages over, right before every event.
    Default: four fifths of the shortest time from one event to the next."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (rank-stabilised LoRA) instead of alpha / r."""

    implementation: ClassVar[str] = "salient_ds.methods.spectral.method:Spectral"
    packable: ClassVar[bool] = True
    compilable: ClassVar[bool] = True
    compactable: ClassVar[Literal["never", "last", "every"]] = "every"

    @field_validator("prune_at", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return value if value is None or isinstance(value, list | tuple) else [value]

    @field_validator("prune_at")
    @classmethod
    def _some(cls, value: list[float] | None) -> list[float] | None:
        if value == []:
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
        steps = self.prune_steps(total_steps)
        watched = self.window_steps(steps, total_steps) if self.score == "gate_fisher" else 0
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

    def prune_steps(self, total_steps: int) -> list[int]:
        """The steps of ``prune_at``.

        Raises:
            ValueError: see :func:`steps_or_fraction`.
        """
        count = max(1, min(5, total_steps // 8))
        values = [0.5 * (k + 1) / count for k in range(count)] if self.prune_at is None else self.prune_at
        return [steps_or_fraction(value, total_steps) for value in values]

    def window_steps(self, steps: list[int], total_steps: int) -> int:
        """Steps of a window, at least 1. ``steps``: those of the events."""
        if self.window is not None:
            return max(1, steps_or_fraction(self.window, total_steps))
        shortest = min(after - before for before, after in pairwise([0, *steps]))
        return max(1, shortest * 4 // 5)

    def _misplaced(self, step: int, before: int, watched: int, total_steps: int) -> str:
        window = f" after a window of {watched} steps (method.window)" if watched else ""
        given = self.prune_at or "default"
        return (
            f"method.prune_at={given}: an event at step {step}{window} does not fit between step {before} and "
            f"the end of training at step {total_steps}: give rising steps, or fractions of all steps"
        )

    def final_total(self, layout: RankLayout, total_steps: int) -> int:
        """The target."""
        return self.wanted_total(len(layout.ranks))

    def statistics_bytes(self, layout: RankLayout) -> int:
        """A few float64 numbers per row."""
        return 32 * layout.total

    def event_traffic(self, layout: RankLayout, elements: int) -> int:
        """Master and both moments of all factors to the process that rotates them, and back; two spectra in fp64."""
        return 24 * elements + 16 * layout.total

    def step_traffic(self, layout: RankLayout, accumulation: int) -> int:
        """In the steps of a window of ``score: gate_fisher``, a sum per row in fp64."""
        return 8 * layout.total if self.score == "gate_fisher" else 0

    def event_bytes(self, layout: RankLayout) -> int:
        """A group of matrices with their moments (128 MiB, or the largest one), twice, and one of them in float64."""
        sides = zip(layout.in_features, layout.out_features, layout.ranks, strict=True)
        largest = 3 * max(rank * (wide + tall) for wide, tall, rank in sides)
        return 8 * max(2**25, largest) + 4 * 8 * largest
