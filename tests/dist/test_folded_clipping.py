"""Clipping inside AdamW's kernel is clipping: the same run as with DeepSpeed's, gradients seen by methods included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.engine import build as building
from salient_ds.zero.internals.clipping import can_fold_clipping, norm_over_processes
from tests.dist import scenario
from tests.dist.scenario import Case
from tests.support.spawn import spawn

ADALORA = {"name": "adalora", "target_rank": 2, "initial_warmup": 2, "final_warmup": 4, "interval": 2}
CLIPPED = {"max_grad_norm": 0.05}
CASES = [
    Case(2, "bf16", train=CLIPPED, speed={"compaction": "last"}),
    Case(2, train=CLIPPED, method=ADALORA, speed={}),
]


def _run(global_rank: int, world_size: int, model: Path, fused: bool) -> list[Any]:
    made: list[Any] = []
    plain_fold = building.fold_clipping

    def counted(engine: Any, bound: float) -> None:
        made.append(bound)
        plain_fold(engine, bound)

    building.fold_clipping = counted
    building.uses_fused_optimizer = lambda ds_config, device: fused  # torch's fused AdamW runs on CPUs too
    return [scenario.run(global_rank, world_size, model, CASES), made]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_run_as_with_deepspeeds_own_clipping(tiny_llama: Path, world_size: int) -> None:
    folded, plain = (spawn(world_size, _run, tiny_llama, fused)[0] for fused in (True, False))
    assert set(folded[1]) == {0.05} and plain[1] == []
    for mine, theirs, tolerance in zip(folded[0], plain[0], (1e-2, 1e-4), strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
    assert folded[0][1]["digests"] == plain[0][1]["digests"]
    moments = [torch.cat([f["exp_avg"] for f in run[0][1]["state"]["fragments"]]) for run in (folded, plain)]
    assert 0 < float(moments[1].norm()) < 2 * 0.05  # AdamW forgets the gradients' scale, its moments do not
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-3, atol=1e-6)


def _overflow(global_rank: int, world_size: int, model: Path) -> tuple[list[bool], list[bool], list[int]]:
    """Three steps; in the second one process has a gradient that is not finite."""
    building.uses_fused_optimizer = lambda ds_config, device: True
    engine = scenario.build(CASES[0], model, world_size)
    parameter = next(p for p in engine.adapted.trained.parameters() if p.requires_grad)
    skipped, changed, steps = [], [], []
    for attempt in range(3):
        before = [buffer.detach().clone() for buffer in engine.shards.layout.buffers]
        broken = attempt == 1 and global_rank == world_size - 1
        hook = parameter.register_hook(lambda grad, broken=broken: grad * float("inf") if broken else grad)
        skipped.append(engine.train_step(*scenario.batches(attempt, global_rank, world_size)).skipped)
        hook.remove()
        changed.append(any(not torch.equal(b, a) for b, a in zip(before, engine.shards.layout.buffers, strict=True)))
        steps.append(engine.step)
    return skipped, changed, steps


@pytest.mark.parametrize("world_size", [1, 2])
def test_steps_that_are_not_finite_are_skipped_by_all(tiny_llama: Path, world_size: int) -> None:
    for skipped, changed, steps in spawn(world_size, _overflow, tiny_llama):
        assert skipped == [False, True, False] and changed == [True, False, True] and steps == [1, 1, 2]


def test_the_norm_adds_up_in_fp32() -> None:
    """A norm rounded to bf16 would be 71."""
    grads = [torch.ones(5000, dtype=torch.bfloat16), 2 * torch.ones(10, dtype=torch.bfloat16)]
    assert float(norm_over_processes(grads, "cpu")) == pytest.approx(5040**0.5, rel=1e-6)
    assert not norm_over_processes([*grads, torch.tensor([float("nan")])], "cpu").isfinite()


@pytest.mark.parametrize(
    ("changed", "precision", "fused"),
    [({"gradient_clipping": 0}, "bf16", True), ({"optimizer": {}}, "bf16", True), ({}, "fp16", True),
     ({}, "bf16", False), ({"zero_optimization": {"stage": 1}}, "bf16", True)],
)  # fmt: skip
def test_where_it_cannot_be_folded_deepspeed_clips(changed: dict[str, Any], precision: str, fused: bool) -> None:
    ds_config = {"gradient_clipping": 1.0, "zero_optimization": {"stage": 2}}
    assert can_fold_clipping(ds_config, "bf16", True)
    assert not can_fold_clipping(ds_config | changed, precision, fused)


def test_the_gradient_that_hooks_see_after_the_step_is_the_clipped_one() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.full((4,), 3.0)
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.step()
    assert torch.equal(parameter.grad, torch.full((4,), 1.5))
