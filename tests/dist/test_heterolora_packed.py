"""HeteroLoRA with packed factors searches, freezes and scores as with a parameter per factor, at stages 0, 2 and 3."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import heterolora_worker as worker
from tests.dist import scenario
from tests.dist.scenario import Case
from tests.support.spawn import spawn

pytestmark = pytest.mark.slow
# drawn modules come and go; scores are compared by themselves
SEARCH = {"name": "heterolora", "proxy": "constant", "interval": 3, "interval_unit": "steps", "keep": 0.5,
          "tie_seed": 3}  # fmt: skip
APART = Case(2, method=SEARCH, train={"weight_decay": 0.1, "max_steps": worker.STEPS}, speed={"packing": "none"})
PACKED = {f"stage{stage}": replace(APART, stage=stage, speed={"packing": "layer"}) for stage in (0, 2, 3)}


def run(global_rank: int, world_size: int, model: Path) -> dict[str, Any]:
    return {key: one(global_rank, world_size, model, case) for key, case in {"apart": APART, **PACKED}.items()}


def one(global_rank: int, world_size: int, model: Path, case: Case) -> dict[str, Any]:
    engine = worker.build(case, model, world_size)
    losses = worker.advance(engine, worker.STEPS, global_rank, world_size)
    method = worker.method_of(engine)
    found = {"losses": losses, "history": list(method.history), "steps": list(method.rates.steps_M),
             "scores": worker.scores_of(engine), "packed": engine.adapted.packed is not None,
             "state": scenario.local_state(engine)}  # fmt: skip
    engine.engine.destroy()
    return found


@pytest.fixture(scope="module")
def two(tiny_llama: Path) -> list[dict[str, Any]]:
    return spawn(2, run, tiny_llama, timeout=240)


@pytest.mark.parametrize("key", PACKED)
def test_packed_equals_separate(two: list[dict[str, Any]], key: str) -> None:
    for found in two:
        apart, packed = found["apart"], found[key]
        assert (apart["packed"], packed["packed"]) == (False, True)
        torch.testing.assert_close(packed["losses"], apart["losses"], rtol=2e-4, atol=1e-5)
        assert [event["on"] for event in packed["history"]] == [event["on"] for event in apart["history"]]
        assert len(apart["history"]) == 4 and len({tuple(event["on"]) for event in apart["history"]}) > 1
        assert packed["steps"] == apart["steps"] and min(apart["steps"]) < worker.STEPS
        for proxy, score_M in packed["scores"].items():
            torch.testing.assert_close(score_M, apart["scores"][proxy], rtol=5e-3, atol=1e-6, msg=f"{key} {proxy}")
        assert {"grad_norm", "snip", "fisher", "synflow"} <= set(packed["scores"])


def test_fewer_parameters_are_stepped(two: list[dict[str, Any]]) -> None:
    """Neighbours that are off are restored together."""
    assert all(len(found["apart"]["state"]["fragments"]) >= len(found["stage2"]["state"]["fragments"]) for found in two)
