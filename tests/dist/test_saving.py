"""Checkpoints are written beside training: what they hold, how large they are, and what a full disk does."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from tests.dist import saving_worker
from tests.dist.scenario import Case
from tests.support.spawn import spawn

CASES = [
    Case(2),
    Case(0, method={"name": "adalora", "target_rank": 2, "initial_warmup": 2, "final_warmup": 2, "interval": 2}),
]


@pytest.fixture(scope="module")
def two(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawn(2, saving_worker.everything, tiny_llama, tmp_path_factory.mktemp("saving"), CASES)


@pytest.mark.parametrize("index", range(len(CASES)))
def test_training_goes_on_while_a_checkpoint_is_written(two: list[Any], index: int) -> None:
    """It holds the step at which it began, byte for byte, although steps and an event changed everything since."""
    for result in two:
        found = result["writing"][index]
        assert found["busy"] == [True] * 4 and not found["there"]
        assert found["same"] and found["equal"]
        assert found["names"] == ["step-00000003"]


def test_a_full_disk_reaches_all_processes(two: list[Any]) -> None:
    for result in two:
        found = result["full"]
        assert "checkpoint of step 4 was not written ([Errno 28] No space left" in found["message"]
        assert "step-00000003" in found["message"] and "--resume auto" in found["message"]
        assert found["left"] == ["step-00000003"] and found["after"] == 2
    assert two[0]["full"]["step"] == two[1]["full"]["step"]


@pytest.mark.parametrize("index", range(len(saving_worker.FROZEN)))
def test_a_frozen_weight_that_changes_is_noticed_at_the_next_save(two: list[Any], index: int) -> None:
    for result in two:
        found = result["frozen"][index]
        assert "checkpoint of step 6 was not written, because the frozen weights " in found["message"]
        assert f"on process 1 on {socket.gethostname()}; the last whole one is" in found["message"]
        assert found["left"] == ["step-00000002", "step-00000005"]


def test_a_checkpoint_holds_live_rows_and_nothing_of_the_base(two: list[Any]) -> None:
    """Masters and two moments in fp32 are 12 bytes per element, and 12 before pruned rows are dropped, too."""
    found = two[0]["sizes"]
    for when in ("before", "after"):
        part = found[when]
        headers = part["shards"] - 12 * part["live"]
        assert 0 < headers < 40_000  # names, and the window of the method
        assert part["total"] - part["shards"] < 40_000
        assert all(".lora_" in name for name in part["names"])
    assert found["after"]["live"] < 0.5 * found["before"]["live"]
    assert 4 * found["base"] > found["before"]["total"]
