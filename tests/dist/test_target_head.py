"""Head and loss at target positions only, at every ZeRO stage and with compiled layers: the same training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.engine.reports import MicroBatch
from salient_ds.models.target_head import INDEX, target_index, uses_target_head
from tests.dist import scenario
from tests.dist.scenario import Case
from tests.dist.test_parity import TINY_PARTITIONS
from tests.support.spawn import spawn

pytestmark = pytest.mark.slow
METHOD = {"name": "lora"}
PLAIN = Case(2, method=METHOD, train={"max_steps": 4}, speed={})
CASES = {
    "stage0": replace(PLAIN, stage=0), "stage1": replace(PLAIN, stage=1), "stage2": PLAIN,
    "sharded": replace(PLAIN, stage=3, zero=TINY_PARTITIONS),
    "partitioned": replace(PLAIN, stage=3, zero=TINY_PARTITIONS, speed={"zero3": "partitioned"}),
    "compiled": replace(PLAIN, speed={"compile_layers": True}),
}  # fmt: skip


def run(global_rank: int, world_size: int, model: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"all": train(PLAIN, global_rank, world_size, model)}
    torch._dynamo.config.suppress_errors = False
    compiler = torch.compile
    torch.compile = lambda function: compiler(function, backend="eager")
    for key, case in CASES.items():
        wanted = replace(case, speed=case.speed | {"target_head": True})
        found[key] = train(wanted, global_rank, world_size, model)
    return found


def train(case: Case, global_rank: int, world_size: int, model: Path) -> dict[str, Any]:
    engine = scenario.build(case, model, world_size)
    used, losses = uses_target_head(engine.adapted.model), []
    for step in range(4):
        batches, targets = scenario.batches(step, global_rank, world_size)
        if used and step % 2:  # with the index of the data, and without
            batches = [
                MicroBatch(b.inputs | {INDEX: target_index(b.inputs["labels"])}, b.num_targets, b.indices)
                for b in batches
            ]
        losses.append(engine.train_step(batches, targets).loss)
    engine.engine.destroy()
    return {"used": used, "losses": losses}


@pytest.fixture(scope="module")
def two(tiny_llama: Path) -> list[dict[str, Any]]:
    return spawn(2, run, tiny_llama, timeout=240)


@pytest.mark.parametrize("key", CASES)
def test_losses_are_those_of_all_logits(two: list[dict[str, Any]], key: str) -> None:
    for found in two:
        assert found[key]["used"] and not found["all"]["used"]
        assert found[key]["losses"] == pytest.approx(found["all"]["losses"], rel=2e-5)
