"""Schedules: they end where they should, never give ranks back, and say what is wrong with impossible numbers."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import pairwise

import pytest

from salient_ds.methods.salientlora.options import SalientLoRAConfig
from salient_ds.ranks import Event
from salient_ds.salience.budget import (
    AllocationPlan,
    leading_losses,
    paper_schedule,
    reference_schedule,
    reference_trace,
)
from salient_ds.steps import steps_or_fraction
from tests.support.layouts import layout_of


def random_plans(count: int, seed: int) -> list[AllocationPlan]:
    """Plans of all sizes whose phase holds at least one window."""
    dice = random.Random(seed)
    plans = []
    while len(plans) < count:
        total_steps = int(10 ** dice.uniform(1, 4.3))
        initial = dice.randint(1, 10 ** dice.randint(1, 5))
        window_initial = dice.choice([2, 3, 10, 10, 10, 25])
        plan = AllocationPlan(
            total_steps,
            initial,
            dice.randint(1, initial),
            initial_warmup=dice.choice([0, 0, 1, dice.randint(0, total_steps // 2)]),
            final_warmup=dice.choice([0, 0, 1, dice.randint(0, total_steps // 2)]),
            window_initial=window_initial,
            window_final=dice.choice([window_initial, 30, 200, 200]),
        )
        if plan.phase_steps > plan.window_initial:
            plans.append(plan)
    return plans


def check_events(events: list[Event], plan: AllocationPlan, first_step: int, last_step: int) -> None:
    """Windows lie side by side from ``first_step`` on, budgets fall from below N to at least the target."""
    assert events[0].window_start == first_step
    assert events[-1].step <= last_step
    for event in events:
        assert event.window == event.step - event.window_start + 1 >= plan.window_initial
        assert plan.target_total <= event.total_rank <= plan.initial_total
    for before, after in pairwise(events):
        assert after.window_start == before.step + 1
        assert after.total_rank <= before.total_rank


def test_a_fixed_window_falls_along_the_limit_of_short_windows() -> None:
    """T_i = T_f: budgets fall step by step, and are those of a first window that is short beside the last one."""
    fixed = AllocationPlan(1000, 4800, 600, window_initial=50, window_final=50)
    totals = [event.total_rank for event in paper_schedule(fixed)]
    assert len(totals) == 20 and totals[0] > 4000 and totals[-1] == 600
    assert all(before >= after for before, after in pairwise(totals))
    short = AllocationPlan(1000, 4800, 600, window_initial=1, window_final=1_000_000)
    for progress in (0.05, 0.5, 0.95):
        assert fixed.total_after(progress) == pytest.approx(short.total_after(progress), abs=0.1)


def test_paper_schedule_ends_at_exactly_the_target() -> None:
    for plan in random_plans(400, seed=1):
        events = paper_schedule(plan)
        last_step = plan.total_steps - plan.final_warmup
        check_events(events, plan, plan.initial_warmup + 1, last_step)
        assert (events[-1].step, events[-1].total_rank) == (last_step, plan.target_total), plan


def test_paper_schedule_without_final_prune_is_its_regular_part() -> None:
    for plan in random_plans(200, seed=2):
        regular, closed = paper_schedule(plan, final_prune=False), paper_schedule(plan)
        check_events(regular, plan, plan.initial_warmup + 1, plan.total_steps - plan.final_warmup)
        shared = sorted(set(closed) & set(regular), key=lambda event: event.step)
        assert shared == regular[: len(shared)]
        assert len(closed) - len(shared) <= 1
        assert len(regular) - len(shared) <= 1


def test_reference_schedule_with_final_prune_ends_at_exactly_the_target() -> None:
    for plan in random_plans(200, seed=3):
        regular, closed = reference_schedule(plan), reference_schedule(plan, final_prune=True)
        last_step = min(plan.total_steps, plan.total_steps - plan.final_warmup + 1)
        for events in (regular, closed):
            check_events(events, plan, plan.initial_warmup + 2, last_step)
        assert (closed[-1].step, closed[-1].total_rank) == (last_step, plan.target_total)


def test_windows_of_the_paper_schedule_follow_its_formula() -> None:
    plan = AllocationPlan(10_000, 1080, 144, initial_warmup=500, final_warmup=1500)
    events = paper_schedule(plan)
    n = [event.step - 500 for event in events]
    assert n[0] == 10
    for before, after in pairwise(n[:-1]):
        assert after - before == round(200 - 190 * (1 - before / 8000) ** 3)
    for at, event in zip(n[:-1], events[:-1], strict=True):
        window = 200 - 190 * (1 - at / 8000) ** 3
        assert event.total_rank == int(1080 - window / 200 * (1080 - 144))
    assert n[-1] == 8000


def test_a_short_tail_is_merged_into_the_final_window() -> None:
    # T is 10 throughout, so that the regular events come at n = 10, 20, 30, 40
    def steps(phase: int) -> list[tuple[int, int]]:
        plan = AllocationPlan(phase, 100, 20, window_final=10)
        return [(event.window_start, event.step) for event in paper_schedule(plan)]

    assert steps(40) == [(1, 10), (11, 20), (21, 30), (31, 40)]
    assert steps(49) == [(1, 10), (11, 20), (21, 30), (31, 49)]
    assert steps(50) == [(1, 10), (11, 20), (21, 30), (31, 40), (41, 50)]
    assert steps(12) == [(1, 12)]


def test_reference_windows_start_one_step_later_and_losses_at_the_first() -> None:
    plan = AllocationPlan(400, 100, 20, initial_warmup=50, final_warmup=100)
    first = reference_schedule(plan)[0]
    # the code records s > n_i with s = step - 1
    assert (first.window_start, first.step, first.window) == (52, 61, 10)
    assert leading_losses("reference", 50) == 0
    assert leading_losses("reference", 0) == 1
    assert leading_losses("paper", 0) == 0


def test_reference_trace_covers_every_step() -> None:
    trace = reference_trace(AllocationPlan(60, 100, 20, initial_warmup=5, final_warmup=20))
    assert len(trace) == 60
    assert [s for s, state in enumerate(trace) if state.event] == [15]
    assert trace[5].total_rank == 100
    assert trace[-1].total_rank == 20


@pytest.mark.parametrize("schedule", [paper_schedule, reference_schedule])
def test_a_schedule_without_event_names_numbers_and_ways_out(schedule: object) -> None:
    plan = AllocationPlan(100, 32, 8, initial_warmup=50, final_warmup=43)
    with pytest.raises(ValueError) as caught:
        schedule(plan)  # type: ignore[operator]
    text = str(caught.value)
    for part in ("no allocation event", "total_steps=100", "initial_warmup=50", "final_warmup=43"):
        assert part in text
    for part in ("leaves 7 steps", "window_initial=10", "train 3 steps longer", "window_initial to 7"):
        assert part in text


def test_following_the_advice_gives_an_event() -> None:
    for wrong in (0, 5, 9):
        plan = AllocationPlan(wrong, 32, 8)
        with pytest.raises(ValueError, match=f"train {10 - wrong} steps longer"):
            paper_schedule(plan)
        assert paper_schedule(AllocationPlan(10, 32, 8))[-1].total_rank == 8
    with pytest.raises(ValueError, match="train 1 steps longer"):
        reference_schedule(AllocationPlan(10, 32, 8))
    assert len(reference_schedule(AllocationPlan(11, 32, 8))) == 1


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"target_total": 33}, ["33 is above", "32", "adapter.rank"]),
        ({"target_total": 0}, ["0 is below 1", "target_rank"]),
        ({"final_warmup": 61}, ["initial_warmup=40 + final_warmup=61", "total_steps=100", "train longer"]),
    ],
)
def test_contradictory_numbers(change: dict[str, int], parts: list[str]) -> None:
    good = {"total_steps": 100, "initial_total": 32, "target_total": 8, "initial_warmup": 40, "final_warmup": 20}
    AllocationPlan(**good)
    with pytest.raises(ValueError) as caught:
        AllocationPlan(**{**good, **change})
    assert all(part in str(caught.value) for part in parts), caught.value


def test_steps_or_fraction() -> None:
    assert [steps_or_fraction(v, 700) for v in (0, 0.1, 0.999, 1, 350.0)] == [0, 70, 699, 1, 350]
    with pytest.raises(ValueError, match=r"1\.5 is neither .* write 2 steps, or 0\.015"):
        steps_or_fraction(1.5, 100)
    with pytest.raises(ValueError, match="-3 steps is negative"):
        steps_or_fraction(-3, 100)


def test_events_of_a_configuration() -> None:
    layout = layout_of((8, 8, 4))
    config = SalientLoRAConfig(target_rank=2.5, initial_warmup=0.1, final_warmup=100)
    plan = config.plan(layout, 1000)
    assert (plan.initial_total, plan.target_total, plan.initial_warmup, plan.final_warmup) == (20, 8, 100, 100)
    assert config.events(layout, 1000) == paper_schedule(plan)
    as_code = SalientLoRAConfig(target_total=8, initial_warmup=100, final_warmup=100, preset="reference")
    assert as_code.events(layout, 1000) == reference_schedule(plan)
    assert as_code.events(layout, 1000)[-1].step < 900
    closed = as_code.model_copy(update={"final_prune": True})
    assert closed.events(layout, 1000)[-1].step == 901


def test_budget_needs_no_torch() -> None:
    code = "import sys, salient_ds.salience.budget, salient_ds.methods.options; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
