"""When ranks are removed and how many remain: the events of a run, known before it starts. No torch.

Numbers: N = initial sum of ranks, n_i = initial warm-up, n_f = length of the allocation phase between the two
warm-ups, T_i and T_f = first and last window length, all in steps. Steps are applied optimizer steps, counted from 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from salient_ds.ranks import Event

MOST_EVENTS = 100_000
"""The longest schedule."""


def refuse_many(events: int) -> None:
    """Raise ValueError if a schedule has more than :data:`MOST_EVENTS` events."""
    if events > MOST_EVENTS:
        raise ValueError(
            f"the schedule has more than {MOST_EVENTS:,} allocation events: lengthen its interval or window, or train "
            "for fewer steps"
        )


@dataclass(frozen=True)
class AllocationPlan:
    """The numbers that define a schedule, checked against each other.

    Raises:
        ValueError: the target is below 1 or above the initial total, or the warm-ups are longer than training.
    """

    total_steps: int
    initial_total: int
    """N, the sum of ranks at the start."""
    target_total: int
    """Sum of ranks wanted at the end."""
    initial_warmup: int = 0
    final_warmup: int = 0
    window_initial: int = 10
    window_final: int = 200

    def __post_init__(self) -> None:
        if self.target_total < 1:
            raise ValueError(
                f"target total rank {self.target_total} is below 1: at least one singular value has to stay, "
                "raise method.target_rank or method.target_total"
            )
        if self.target_total > self.initial_total:
            raise ValueError(
                f"target total rank {self.target_total} is above the initial total {self.initial_total}: ranks "
                "are only taken away, so lower method.target_rank or method.target_total, or raise adapter.rank"
            )
        if self.phase_steps < 0:
            raise ValueError(
                f"initial_warmup={self.initial_warmup} + final_warmup={self.final_warmup} exceeds "
                f"total_steps={self.total_steps}: lower one, or train longer"
            )

    @property
    def phase_steps(self) -> int:
        """Length of the allocation phase between the two warm-ups."""
        return self.total_steps - self.initial_warmup - self.final_warmup

    def window_at(self, progress: float) -> float:
        """T = T_f + (T_i - T_f)(1 - progress)^3, the window length after a fraction ``progress`` of the phase."""
        return self.window_final + (self.window_initial - self.window_final) * (1 - progress) ** 3

    def total_at(self, window: float) -> float:
        """r = N - T / T_f (N - target), the sum of ranks that belongs to the window length T."""
        return self.initial_total - (window / self.window_final) * (self.initial_total - self.target_total)

    def total_after(self, progress: float) -> float:
        """The sum of ranks after a fraction ``progress`` of the phase: r at the window of that time.

        With a fixed window, T_i = T_f, this r would be the target at once. Then it is what r tends to for short first
        windows, T_i -> 0: target + (N - target)(1 - progress)^3.
        """
        if self.window_initial < self.window_final:
            return self.total_at(self.window_at(progress))
        return self.target_total + (self.initial_total - self.target_total) * (1 - progress) ** 3


def paper_schedule(plan: AllocationPlan, final_prune: bool = True) -> list[Event]:
    """Events as the paper means them (Ke et al., NeurIPS 2024: adaptive length of the time window).

    Let n = step - n_i, with T(n) and r(n) as in :class:`AllocationPlan`. The first event comes at n = T_i. After an
    event at n, the next one comes T(n) steps (rounded) later. The budget is r(n), rounded down
    (:meth:`AllocationPlan.total_after`).

    With ``final_prune`` the last event falls on the end of the phase, and its budget is the target. A regular event
    less than T_i steps before it is merged into it.

    Differs from the reference: progress is n / n_f (the code divides by n_i + n_f), and the target is reached.

    Raises:
        ValueError: the phase is shorter than the first window, so nothing would ever be pruned.
    """
    _require_event(plan, plan.phase_steps)
    events: list[Event] = []
    start, n = 1, plan.window_initial
    while n <= plan.phase_steps:
        refuse_many(len(events))
        progress = n / plan.phase_steps
        window = plan.window_at(progress)
        budget = min(int(plan.total_after(progress)), events[-1].total_rank if events else plan.initial_total)
        step = plan.initial_warmup + n
        events.append(Event(step, max(budget, plan.target_total), plan.initial_warmup + start, n - start + 1))
        start, n = n + 1, n + max(1, round(window))
    last_step = plan.initial_warmup + plan.phase_steps
    return _end_at_target(events, plan, last_step) if final_prune else events


class ReferenceStep(NamedTuple):
    """State of the released code after one step."""

    total_rank: int
    """The budget that it reports (also between events)."""
    event: bool
    """Whether it prunes at this step."""
    steps_left: int
    """Steps from this one until the next prune."""


def reference_trace(plan: AllocationPlan) -> list[ReferenceStep]:
    """The released code's counters at every step. Element s belongs to our step s + 1.

    Allocation runs while n_i < s <= total - final_warmup, with s counted from 0. The code divides by
    total - final_warmup instead of the length of the phase, rounds T half to even, and truncates the budget.
    """
    return list(_reference_steps(plan))


def _reference_steps(plan: AllocationPlan) -> Iterator[ReferenceStep]:
    left = plan.window_initial
    end = plan.total_steps - plan.final_warmup
    for s in range(plan.total_steps):
        total, due = plan.initial_total, False
        if s > end:
            total = plan.target_total
        elif s > plan.initial_warmup:
            window = round(plan.window_at((s - plan.initial_warmup) / end))
            total = int(plan.total_at(window))
            left -= 1
            due = left == 0
            left = window if due else left
        yield ReferenceStep(total, due, left)


def reference_schedule(plan: AllocationPlan, final_prune: bool = False) -> list[Event]:
    """Events of the released code (Heyest/SalientLoRA). Step s of the code is step s + 1 here.

    The code's last event comes up to T_f steps before the end of the phase, and its budget is usually above the target.
    ``final_prune`` adds the missing event. A new window starts after every event.

    Raises:
        ValueError: the phase is shorter than the first window, so nothing would ever be pruned.
    """
    last_step = min(plan.total_steps, plan.total_steps - plan.final_warmup + 1)
    _require_event(plan, last_step - 1 - plan.initial_warmup)
    events: list[Event] = []
    start = plan.initial_warmup + 2
    for s, state in enumerate(_reference_steps(plan)):
        if state.event:
            refuse_many(len(events))
            step = s + 1
            events.append(Event(step, state.total_rank, start, step - start + 1))
            start = step + 1
    return _end_at_target(events, plan, last_step) if final_prune else events


def leading_losses(schedule: str, initial_warmup: int) -> int:
    """How many steps before the first window the loss history begins: 1 in the released code without warm-up, else 0.

    In its step 0, that code records the loss but not yet the singular values. So each value of the first window is
    weighted with the loss of the step before it.
    """
    return 1 if schedule == "reference" and initial_warmup == 0 else 0


def _require_event(plan: AllocationPlan, usable_steps: int) -> None:
    """Raise if allocation ends before the first window is full: fewer ``usable_steps`` than ``window_initial``."""
    if usable_steps >= plan.window_initial:
        return
    missing = plan.window_initial - usable_steps
    raise ValueError(
        f"no allocation event: total_steps={plan.total_steps} - initial_warmup={plan.initial_warmup} - "
        f"final_warmup={plan.final_warmup} leaves {max(usable_steps, 0)} steps to observe, fewer than "
        f"window_initial={plan.window_initial}, so that all {plan.initial_total} ranks would stay (target "
        f"{plan.target_total}): train {missing} steps longer, shorten a warm-up by {missing}, or lower "
        "window_initial" + (f" to {usable_steps}" if usable_steps >= 2 else "")
    )


def _end_at_target(events: list[Event], plan: AllocationPlan, last_step: int) -> list[Event]:
    """Make ``last_step`` the last event, with the target as its budget."""
    kept = [event for event in events if last_step - event.step >= plan.window_initial]
    start = kept[-1].step + 1 if kept else events[0].window_start
    return [*kept, Event(last_step, plan.target_total, start, last_step - start + 1)]
