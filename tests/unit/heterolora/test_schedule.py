"""When modules are switched, and how many ranks may live."""

from __future__ import annotations

from typing import Any

import pytest

from salient_ds.heterolora.module_select import Candidates, KeptShare, budgets
from salient_ds.heterolora.options import HeteroLoRAConfig
from salient_ds.heterolora.schedule import (
    SearchSpace,
    constant_steps,
    largest_total,
    search_events,
    search_steps,
)

SPACE = SearchSpace((4,) * 6 + (2,) * 7, (80,) * 6 + (40,) * 7, (False,) * 6 + (True,) * 7)


def config(**options: Any) -> HeteroLoRAConfig:
    return HeteroLoRAConfig(**options)


def reference_steps(steps: int, interval: float, epochs: int) -> list[int]:
    """The released callback: step i of every epoch with i mod ceil(steps * interval) = 0."""
    every = -(-round(steps * interval * 1000) // 1000)
    return [e * steps + i for e in range(epochs) for i in range(steps) if i % every == 0]


@pytest.mark.parametrize(("steps", "interval"), [(8, 0.25), (10, 0.2), (7, 0.3), (458, 0.2), (5, 1.0), (3, 0.01)])
def test_epochs_are_cut_as_in_the_released_code(steps: int, interval: float) -> None:
    assert search_steps(config(interval=interval), 3 * steps, steps) == reference_steps(steps, interval, 3)


def test_longer_intervals_whole_steps_and_an_early_end() -> None:
    assert search_steps(config(interval=2.0), 40, 8) == [0, 16, 32]
    assert search_steps(config(interval=6, interval_unit="steps"), 20, None) == [0, 6, 12, 18]
    assert search_steps(config(interval=6, interval_unit="steps", search_end=0.6), 20, None) == [0, 6]
    assert search_steps(config(interval=0.5, search_end=0.5), 32, 8) == [0, 4, 8, 12]


def test_an_epoch_of_unknown_length_is_refused() -> None:
    with pytest.raises(ValueError, match="interval_unit=steps"):
        search_steps(config(), 20, None)
    with pytest.raises(ValueError, match="constant_epochs=0"):
        constant_steps(config(constant_epochs=2), None)
    assert constant_steps(config(constant_epochs=2), 8) == 16 and constant_steps(config(), None) == 0
    with pytest.raises(ValueError, match=r"method.interval=2.5 with interval_unit=steps must be whole"):
        config(interval=2.5, interval_unit="steps")


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"keep": 0.34, "mode": "off"}, 2 * 4 + 7 * 2),  # shortcuts stay on
        ({"keep": 0.34, "mode": "separated"}, 2 * 4 + 2 * 2),
        ({"keep": 0.34, "mode": "combined"}, 4 * 4),  # at most: all four are linear layers
        ({"keep": 0.5, "mode": "separated"}, 3 * 4 + 4 * 2),  # 3.5 shortcuts: half to even
        ({"keep": 1.0}, 6 * 4 + 7 * 2),
        ({"keep": 0.5, "mode": "combined", "budget_unit": "params"}, 19),  # 380 of 760 elements at 20 per rank
        ({"keep": 0.5, "mode": "off", "budget_unit": "params"}, 12 + 14),
    ],
)
def test_largest_total(options: dict[str, Any], total: int) -> None:
    assert largest_total(config(**options), SPACE) == total


@pytest.mark.parametrize("mode", ["off", "combined", "separated"])
@pytest.mark.parametrize("unit", ["modules", "params"])
@pytest.mark.parametrize("keep", [0.2, 0.25, 0.33, 0.5, 0.7, 0.9, 1.0])
def test_as_many_as_the_selection_may_switch_on(keep: float, unit: str, mode: str) -> None:
    """What is known before torch is there agrees with what chooses the modules."""
    names = tuple(f"m{k}" for k in range(13))
    space = SearchSpace((4,) * 13, (80,) * 13, SPACE.shortcuts)
    candidates = Candidates(names, space.shortcuts, space.parameters)
    budget = budgets(candidates, KeptShare(keep, mode, unit))  # type: ignore[arg-type]
    found = largest_total(config(keep=keep, mode=mode, budget_unit=unit), space)
    cost = 1 if unit == "modules" else 20  # of a module of rank 4, or of one rank
    whole = [b * 4 if unit == "modules" else b // cost for b in ([sum(budget)] if mode == "combined" else budget)]
    assert abs(found - sum(whole) - (28 if mode == "off" else 0)) <= (unit == "params")


def test_events() -> None:
    events = search_events(config(interval=5, interval_unit="steps", keep=0.34, mode="separated"), SPACE, 11, None)
    assert [(e.step, e.total_rank) for e in events] == [(0, 12), (5, 12), (10, 12)]
    for unit in ("modules", "params"):
        with pytest.raises(ValueError, match=r"method.keep=0.03 of 13 modules is less than one"):
            search_events(config(keep=0.03, budget_unit=unit), SPACE, 11, 8)
