"""NaN losses, overflow steps and disagreement: noticed on every process, and without a trace in the statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dist import fault_worker
from tests.dist.scenario import SALIENT, Case
from tests.dist.test_parity import TINY_PARTITIONS
from tests.support.spawn import spawn

HUGE_SCALE = {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 24, "hysteresis": 1}}
OVERFLOWING = [Case(2, "fp16", ds=HUGE_SCALE), Case(3, "fp16", zero=TINY_PARTITIONS, ds=HUGE_SCALE)]
INFINITE = [
    Case(0), Case(0, train={"max_grad_norm": 0.0}), Case(1), Case(2), Case(3, zero=TINY_PARTITIONS), Case(0, "bf16"),
    Case(2, speed={"zero3": "sharded_base"}),
]  # fmt: skip


@pytest.fixture(scope="module")
def two(tiny_llama: Path) -> list[Any]:
    return spawn(2, fault_worker.everything, tiny_llama, OVERFLOWING, INFINITE)


def test_nan_loss_stops_every_process_before_the_step(two: list[Any]) -> None:
    for result in two:
        assert result["nan"] == {"step": 4, "indices": [2, 3], "unchanged": True, "engine_step": 3}


@pytest.mark.parametrize("index", range(len(OVERFLOWING)))
def test_overflow_steps_are_not_observed(two: list[Any], index: int) -> None:
    first, second = (result["overflow"][index] for result in two)
    assert first["skipped"] >= 3
    assert first["recorded_while_skipping"][:3] == [0, 0, 0]
    assert [step for step, _ in first["decisions"]] == [5, 9, 14]  # counted in applied steps
    assert first["global_steps"] == 16 + first["skipped"]  # DeepSpeed's own count differs
    assert first["digests"] == second["digests"]


@pytest.mark.parametrize("index", range(len(INFINITE)), ids=[str(k) for k in range(len(INFINITE))])
def test_a_step_with_an_infinite_gradient_is_skipped_at_every_stage(two: list[Any], index: int) -> None:
    for result in two:
        found = result["infinite"][index]
        assert found.pop("norm") > 0, INFINITE[index]
        expected = {"skipped": True, "unchanged": True, "kept_rate": True, "taken": True, "finite": True, "step": 4}
        assert found == expected, INFINITE[index]


def test_disagreement_is_an_error_on_every_process(two: list[Any]) -> None:
    for result in two:
        assert "processes disagree on the allocation of step 5" in result["disagreement"]


def test_an_event_costs_two_small_collectives(two: list[Any]) -> None:
    """One packed sum of the statistics and one comparison of digests; ordinary steps pay nothing for the method."""
    assert SALIENT["window_initial"] == 3
    for result in two:
        cost = result["cost"]
        assert cost["ordinary_min"] == cost["ordinary_max"]
        assert cost["event_max"] == cost["ordinary_max"] + 2
