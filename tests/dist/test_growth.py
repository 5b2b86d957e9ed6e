"""Rows that come into being when they are needed: the same training as with all of them from the start."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import growth_worker as worker
from tests.dist.compaction_worker import refuse
from tests.dist.scenario import Case
from tests.dist.test_compaction import whole
from tests.support.spawn import spawn

# events after steps 3, 5, ... 13, two matrices by one row each; room for 3 of 12 rows at first
METHOD = {"name": "increlora", "target_rank": 3, "interval": 2, "top_h": 2, "add": 1}
ROWS, MODULES, TARGET, FIRST_ROOM = 12, 6, 18, 3


def case(stage: int, **speed: Any) -> Case:
    train = {"lr_schedule": "linear", "lr_warmup": 3, "weight_decay": 0.1}
    return Case(stage, method=METHOD, adapter={"rank": ROWS}, train=train, speed=speed)


WHOLE = case(2, growth="preallocated", compaction="none")
FLIGHT = {
    "stage 2": case(2),
    "stage 0": case(0, growth="in_flight"),
    "stage 3": case(3, zero3="sharded_base"),
}

EVEN = case(2, compaction_multiple=4)

each_stage = pytest.mark.parametrize("stage", FLIGHT)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Checkpoints of the run with all rows, and of the one at stage 2 that makes room in flight."""
    return [tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("flight")]


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, folders: list[Path]) -> list[list[dict[str, Any]]]:
    return spawn(2, worker.run, tiny_llama, [WHOLE, *FLIGHT.values(), EVEN], [*folders, None, None, None])


@each_stage
def test_the_same_training(runs: list[list[dict[str, Any]]], stage: str) -> None:
    """Losses, decisions, and of every row that counts in the end master and both moments."""
    index = 1 + list(FLIGHT).index(stage)
    mine, theirs = runs[0][index], runs[0][0]
    assert mine["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert len(theirs["masks"]) == 6
    for one, other in zip(mine["masks"], theirs["masks"], strict=True):
        assert torch.equal(one, other)
    final = theirs["masks"][-1].view(MODULES, ROWS)
    assert mine["ranks"] == tuple(final.sum(1).tolist()) and int(final.sum()) == TARGET
    for key in ("master", "exp_avg", "exp_avg_sq"):
        small, large = whole(runs, index, key), whole(runs, 0, key)
        for (module, factor), values in large.items():
            expected = values[:, final[module]] if factor == "B" else values[final[module]]
            torch.testing.assert_close(small[module, factor], expected, atol=2e-6, rtol=2e-4)


@each_stage
def test_rows_exist_when_they_are_needed(runs: list[list[dict[str, Any]]], stage: str) -> None:
    """A quarter at first, more from some events on but not from each, what counts at the end."""
    for process in runs:
        found, total = process[1 + list(FLIGHT).index(stage)], process[0]
        everything = total["elements"][0] * (2 if stage == "stage 0" else 1)
        assert max(found["elements"]) < 0.45 * everything
        first = found["elements"][0] / everything
        assert first == pytest.approx(FIRST_ROOM / ROWS, rel=0.02)  # but for padding
        assert max(found["elements"]) > 1.2 * found["elements"][0]
        made = found["made"]
        assert not made[0] and 1 <= sum(made) <= 3, made
        sizes = found["elements"]
        assert sum(a != b for a, b in pairwise(sizes)) == sum(made) + 1  # what is left of the room is dropped at last
        assert found["hooks"] <= 1, "a retired engine has left its hooks on the module"
        assert not any(total["made"]) and len(set(total["elements"])) == 1


def test_sizes_are_multiples_where_that_is_asked_for(runs: list[list[dict[str, Any]]]) -> None:
    """Room that is made and what is left at the end; the training stays the same."""
    even, total = runs[0][-1], runs[0][0]
    assert even["losses"] == pytest.approx(total["losses"], rel=1e-5)
    live = total["masks"][-1].view(MODULES, ROWS).sum(1).tolist()
    assert even["ranks"] == tuple(-(-rank // 4) * 4 for rank in live)
    assert any(even["made"]) and any(rank % 4 for rank in live)


def test_checkpoints_resume_with_and_without_room(
    runs: list[list[dict[str, Any]]], folders: list[Path], tiny_llama: Path
) -> None:
    """From before and after room was made, on other processes and stages, and either way round."""
    expected, (total, flight) = runs[0][0]["losses"], folders
    room = FIRST_ROOM * MODULES
    alone = [
        (case(2), flight, worker.BEFORE),
        (case(0, growth="preallocated"), flight, worker.AFTER),
        (case(2), total, worker.AFTER),
    ]
    pair = [
        (case(2, growth="preallocated"), flight, worker.BEFORE),
        (case(3), flight, worker.AFTER),
    ]
    for processes, jobs in ((1, alone), (2, pair)):
        for found, (_, folder, step) in zip(spawn(processes, worker.resume, tiny_llama, jobs)[0], jobs, strict=True):
            assert found["losses"] == pytest.approx(expected[step:], rel=1e-5)
            if folder is total:
                assert found["rows"] == ROWS * MODULES
            elif step == worker.BEFORE:
                assert found["rows"] == room
            else:
                assert room < found["rows"] < 0.6 * ROWS * MODULES
            assert found["left"] == TARGET
    (message,) = spawn(1, refuse, tiny_llama, case(2, packing="none"), flight, worker.BEFORE)
    assert "18 of 72 rows" in message and "packing=none" in message
