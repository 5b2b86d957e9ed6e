"""AdaLoRA's schedule: bounds, the final event, and what is an error; and what the options of every method know."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from salient_ds.methods.adalora.options import AdaLoRAConfig
from salient_ds.methods.lora.options import LoRAConfig
from salient_ds.methods.lora2.options import LoRA2Config
from salient_ds.methods.salientlora.options import SalientLoRAConfig
from salient_ds.salience.budget import AllocationPlan, paper_schedule
from salient_ds.salience.cubic_budget import budget_at, cubic_schedule
from tests.support.layouts import layout_of


def plan(total: int, start: int, final: int, initial: int = 40, target: int = 10) -> AllocationPlan:
    return AllocationPlan(total, initial, target, start, final)


def masks_of_the_released_code(total: int, start: int, final: int, interval: int) -> list[int]:
    """Steps s (0-based) at which it masks."""
    regular = [s for s in range(total) if start < s <= total - final and s % interval == 0]
    return regular + [s for s in range(total) if s > total - final]


def test_budget_by_hand() -> None:
    budgets = [budget_at(plan(20, 4, 6), step) for step in range(1, 21)]
    assert budgets[:5] == [40] * 5
    # s = 5 .. 14: 10 + 30 (1 - (s - 4) / 10)^3, rounded down
    assert budgets[5:15] == [31, 25, 20, 16, 13, 11, 10, 10, 10, 10]
    assert budgets[15:] == [10] * 5


@pytest.mark.parametrize("interval", [1, 3, 7, 100])
@pytest.mark.parametrize("final", [0, 1, 2, 3, 8])
@pytest.mark.parametrize("start", [0, 1, 5, 11])
def test_events_are_the_released_masks_and_one_that_stays(start: int, final: int, interval: int) -> None:
    total = 20
    events = cubic_schedule(plan(total, start, final), interval)
    masks = masks_of_the_released_code(total, start, final, interval)
    steps = [event.step - 1 for event in events]
    end = total - final
    if masks and masks[-1] >= end:  # there is a cut to the target: ours is the first of them
        assert steps == [s for s in masks if s < end] + [min(s for s in masks if s >= end)]
    else:
        assert steps == sorted({*masks, total - 1})
    assert events[-1].total_rank == 10
    budgets = [event.total_rank for event in events]
    assert budgets == sorted(budgets, reverse=True) and max(budgets) <= 40
    assert all(event.window_start == 1 and event.window == min(event.step, end) for event in events)


def test_a_target_equal_to_the_start_has_no_event() -> None:
    assert cubic_schedule(plan(20, 5, 5, initial=12, target=12), 3) == []
    assert cubic_schedule(plan(20, 10, 10, initial=12, target=12), 3) == []


def test_no_event_is_an_error_otherwise() -> None:
    with pytest.raises(ValueError, match=r"initial_warmup=15 \+ final_warmup=5 takes all of total_steps=20") as error:
        cubic_schedule(plan(20, 15, 5), 3)
    assert "from 40 ranks to 10" in str(error.value) and "train longer" in str(error.value)
    with pytest.raises(ValueError, match="exceeds total_steps=20"):
        plan(20, 15, 6)
    with pytest.raises(ValueError, match="above the initial total 40"):
        plan(20, 5, 5, target=41)


def test_configured_numbers() -> None:
    config = AdaLoRAConfig(target_rank=1.5, initial_warmup=0.1, final_warmup=0.2, interval=10)
    events = config.events(layout_of((4, 4)), 100)
    assert [event.step for event in events] == [21, 31, 41, 51, 61, 71, 81]
    assert events[-1].total_rank == 3
    same = AdaLoRAConfig(target_total=3, initial_warmup=10, final_warmup=20)
    assert same.events(layout_of((4, 4)), 100) == events


@pytest.mark.parametrize("kind", [AdaLoRAConfig, LoRA2Config])
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "exactly one of method.target_rank"),
        ({"target_rank": 2, "target_total": 8}, "exactly one of method.target_rank"),
        ({"target_rank": 2, "interval": 0}, "interval"),
        ({"target_rank": 2, "beta1": 1.0}, "beta1"),
        ({"target_rank": 2, "preset": "code"}, "preset"),
    ],
)
def test_wrong_configurations(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_presets_and_what_wins_over_them() -> None:
    def chosen(**values: Any) -> tuple[str, str]:
        options = AdaLoRAConfig(target_rank=1, **values).options()
        return options.moment, options.ties

    assert chosen() == ("reference", "exact")
    assert chosen(preset="paper") == ("paper", "exact")
    assert chosen(preset="reference") == ("reference", "threshold")
    assert chosen(preset="reference", ties="exact", moment="paper") == ("paper", "exact")


def test_options_know_their_events_and_totals() -> None:
    layout, total = layout_of((4, 4, 4)), 60
    salient = SalientLoRAConfig(target_rank=2, window_initial=3, window_final=9)
    assert salient.events(layout, total) == paper_schedule(salient.plan(layout, total))
    for kind in (AdaLoRAConfig, LoRA2Config):
        config = kind(target_rank=2, final_warmup=12, interval=5)
        assert config.events(layout, total) == cubic_schedule(config.plan(layout, total), 5)
        assert (config.plan(layout, total).initial_total, config.plan(layout, total).target_total) == (12, 6)
        assert (config.initial_total(layout), config.final_total(layout, total)) == (12, 6)
    fixed = LoRAConfig()
    assert fixed.events(layout, total) == [] and not hasattr(fixed, "plan")
    assert fixed.initial_total(layout) == fixed.final_total(layout, total) == 12


def test_the_schedules_import_no_torch() -> None:
    """Of no method."""
    code = "import sys; from salient_ds.methods.table import methods; methods(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
