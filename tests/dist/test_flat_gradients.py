"""Gradients that become fp32 in one pass: the same bits as DeepSpeed's two, at ZeRO-1 and 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.engine import build as building
from salient_ds.zero.internals.flat_gradients import can_flatten_in_fp32, joined
from tests.dist import scenario
from tests.dist.scenario import Case
from tests.support.spawn import spawn

CASES = [Case(stage, "bf16", train={"max_grad_norm": 0.5, "max_steps": 4}, speed={}, method={"name": "lora"})
         for stage in (1, 2)]  # fmt: skip


def _run(global_rank: int, world_size: int, model: Path) -> list[list[dict[str, Any]]]:
    made: list[int] = []
    plain = building.flatten_in_fp32

    def counted(engine: Any) -> None:
        made.append(1)
        plain(engine)

    building.flatten_in_fp32 = counted
    found = []
    for flat in (False, True):
        cases = [replace(case, speed={"flat_gradients": flat}) for case in CASES]
        found.append(scenario.run(global_rank, world_size, model, cases))
        assert len(made) == (len(CASES) if flat else 0)
    return found


@pytest.mark.slow
def test_the_same_bits_as_deepspeeds_way(tiny_llama: Path) -> None:
    for before, after in spawn(2, _run, tiny_llama):
        for one, other in zip(before, after, strict=True):
            assert one["losses"] == other["losses"]
            for mine, theirs in zip(one["state"]["fragments"], other["state"]["fragments"], strict=True):
                assert all(torch.equal(mine[name], theirs[name]) for name in ("master", "exp_avg", "exp_avg_sq"))


def test_joined_is_filled_up_with_zeros() -> None:
    grads = [torch.randn(2, 3).bfloat16(), torch.randn(5).bfloat16()]
    found = joined(grads, 14, torch.zeros(1))
    assert found.dtype == torch.float32 and not found[11:].any()
    assert torch.equal(found[:11], torch.cat([grad.view(-1) for grad in grads]).float())


@pytest.mark.parametrize(
    ("stage", "precision", "offload", "expected"),
    [(2, "bf16", False, True), (1, "fp16", False, True), (2, "fp32", False, False), (0, "bf16", False, False),
     (3, "bf16", False, False), (2, "bf16", True, False)],
)  # fmt: skip
def test_only_where_deepspeed_flattens_on_the_device(stage: int, precision: str, offload: bool, expected: bool) -> None:
    zero: dict[str, Any] = {"stage": stage} | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    assert can_flatten_in_fp32({"zero_optimization": zero}, precision) == expected
