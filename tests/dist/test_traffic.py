"""What a step sends equals docs/communication.md, on 1, 2 and 4 processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dist import traffic_worker
from tests.dist.scenario import GLOBAL_BATCH, Case
from tests.support.spawn import spawn

pytestmark = pytest.mark.slow

CASES = {
    "0": Case(0),
    "1": Case(1),
    "2": Case(2),
    "2-bf16": Case(2, "bf16"),
    "sharded": Case(3, speed={"zero3": "sharded_base", "compaction": "none", "growth": "preallocated"}),
}
SMALL = 16
"""Bytes: sums of a few numbers are smaller."""


@pytest.fixture(scope="module", params=[1, 2, 4])
def counted(request: pytest.FixtureRequest, tiny_llama: Path) -> tuple[int, dict[str, Any]]:
    return request.param, spawn(request.param, traffic_worker.steps, tiny_llama, CASES)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_step_sends_what_the_formulas_say(counted: tuple[int, dict[str, Any]], name: str) -> None:
    processes, found = counted
    stage = 2 if name == "sharded" else int(name[0])
    width = 2 if name.endswith("bf16") else 4
    accumulation = GLOBAL_BATCH // processes
    elements = found[name]["elements"]
    for event, log in found[name]["rows"][1:]:  # layers are in their buffers after the first
        gradients = [size for kind, size in log if kind == "all_reduce" and size == elements * width]
        assert len(gradients) == (accumulation if stage == 2 else 1)
        gathered = [size for kind, size in log if kind == "parameters"]
        assert sum(gathered) == (sum(found[name]["groups"]) * width if stage and processes > 1 else 0), log
        rest = [(kind, size) for kind, size in log if kind != "parameters" and size not in gradients]
        if not event:
            assert all(kind == "all_reduce" and size <= SMALL for kind, size in rest) and len(rest) <= 4, rest
        elif processes > 1:
            assert ("all_gather", 32) in rest  # digests
            assert sum(size for _, size in rest) < elements * width  # windows and scores, of rows and not of weights
