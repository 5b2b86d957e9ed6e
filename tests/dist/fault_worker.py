"""Runs in which something goes wrong on purpose."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from salient_ds.engine.engine import AllocatingEngine
from salient_ds.engine.reports import NonFiniteLoss
from salient_ds.zero.internals.layouts import full_numel
from tests.dist import scenario
from tests.dist.scenario import TOTAL_STEPS, Case


def masters(engine: AllocatingEngine) -> list[torch.Tensor]:
    return [engine.shards.master(f).clone() for f in engine.shards.layout.fragments]


def nan_loss(global_rank: int, world_size: int, model: Path) -> dict[str, Any]:
    """Process 1's weights break before step 4: both processes stop, before parameters change."""
    engine = scenario.build(Case(2), model, world_size)
    scenario.advance(engine, 3, global_rank, world_size)
    before = masters(engine)
    if global_rank == 1:
        engine.adapted.model.get_output_embeddings().weight.data.fill_(float("nan"))
    try:
        engine.train_step(*scenario.batches(3, global_rank, world_size))
    except NonFiniteLoss as error:
        unchanged = all(torch.equal(a, b) for a, b in zip(before, masters(engine), strict=True))
        return {"step": error.step, "indices": error.indices, "unchanged": unchanged, "engine_step": engine.step}
    raise AssertionError("a NaN loss went unnoticed")


def overflow(global_rank: int, world_size: int, model: Path, case: Case) -> dict[str, Any]:
    """fp16 with a loss scale far too high: the first steps are skipped and must leave no trace."""
    engine = scenario.build(case, model, world_size)
    skipped, windows, decisions, step_of_batch = 0, [], [], []
    batch = 0
    while engine.step < TOTAL_STEPS:
        start = masters(engine)
        report = engine.train_step(*scenario.batches(batch, global_rank, world_size))
        batch += 1
        if report.skipped:
            skipped += 1
            assert all(torch.equal(a, b) for a, b in zip(start, masters(engine), strict=True))
            windows.append(sum(t.numel() for _, _, t in engine.method.local_state()))
        else:
            step_of_batch.append((batch, engine.step))
        if report.event is not None:
            decisions.append(report.event.decision)
    return {
        "skipped": skipped,
        "recorded_while_skipping": windows,
        "decisions": [(d.step, d.budget) for d in decisions],
        "digests": [d.digest() for d in decisions],
        "global_steps": engine.engine.global_steps,
    }


def infinite_gradient(global_rank: int, world_size: int, model: Path, case: Case) -> dict[str, Any]:
    """Process 1 has one infinite gradient in the fourth batch: all skip that step, and go on with the next batch."""
    engine = scenario.build(case, model, world_size)
    fed = 0
    while engine.step < 3:  # fp16 skips some by itself
        engine.train_step(*scenario.batches(fed, global_rank, world_size))
        fed += 1
    parameter = next(p for p in engine.adapted.trained.parameters() if p.requires_grad and full_numel(p) > 0)

    def spoil(grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad.view(-1)[:1] = float("inf")
        return grad

    handle = parameter.register_hook(spoil) if global_rank == world_size - 1 else None
    before, rate = masters(engine), engine.engine.get_lr()
    spoilt = engine.train_step(*scenario.batches(3, global_rank, world_size))
    unchanged = all(torch.equal(a, b) for a, b in zip(before, masters(engine), strict=True))
    if handle is not None:
        handle.remove()
    kept_rate = engine.engine.get_lr() == rate
    report = engine.train_step(*scenario.batches(4, global_rank, world_size))
    finite = all(bool(tensor.isfinite().all()) for tensor in masters(engine))
    engine.engine.destroy()
    return {"skipped": spoilt.skipped, "unchanged": unchanged, "kept_rate": kept_rate, "taken": not report.skipped,
            "finite": finite, "step": engine.step, "norm": report.grad_norm}  # fmt: skip


def disagreement(global_rank: int, world_size: int, model: Path) -> str:
    """One process decides differently: nobody applies anything."""
    engine = scenario.build(Case(2), model, world_size)
    allocate = engine.method.allocate

    def biased(*args: Any) -> Any:
        decision = allocate(*args)
        mask = decision.mask_N.clone()
        mask[int(mask.nonzero()[0])] = global_rank == 0
        return dataclasses.replace(decision, mask_N=mask)

    engine.method.allocate = biased  # type: ignore[method-assign]
    try:
        scenario.advance(engine, TOTAL_STEPS, global_rank, world_size)
    except RuntimeError as error:
        assert all(bool(a.rank_mask_R.all()) for a in engine.adapted.adapters.values())
        return str(error)
    raise AssertionError("processes disagreed and nobody noticed")


def events_cost(global_rank: int, world_size: int, model: Path) -> dict[str, int]:
    """Collectives per ordinary step, and how many more a step with an allocation has."""
    import deepspeed.comm as ds_comm
    import torch.distributed as dist

    engine = scenario.build(Case(2), model, world_size)
    counts: list[int] = []
    calls = 0

    def counted(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return function(*args, **kwargs)

        return call

    backend = ds_comm.comm.cdb
    wrapped = [(dist, n) for n in ("all_reduce", "all_gather", "broadcast")]
    wrapped += [(backend, n) for n in ("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")]
    for owner, name in wrapped:
        setattr(owner, name, counted(getattr(owner, name)))
    with_event = {}
    while engine.step < TOTAL_STEPS:
        calls = 0
        report = engine.train_step(*scenario.batches(engine.step, global_rank, world_size))
        (with_event.__setitem__(engine.step, calls) if report.event else counts.append(calls))
    return {"ordinary_min": min(counts), "ordinary_max": max(counts), "event_max": max(with_event.values())}


def everything(
    global_rank: int, world_size: int, model: Path, overflow_cases: list[Case], infinite: list[Case]
) -> dict[str, Any]:
    """All faults in one process group; the collectives are counted last, because that leaves wrappers behind."""
    return {
        "nan": nan_loss(global_rank, world_size, model),
        "overflow": [overflow(global_rank, world_size, model, case) for case in overflow_cases],
        "infinite": [infinite_gradient(global_rank, world_size, model, case) for case in infinite],
        "disagreement": disagreement(global_rank, world_size, model),
        "cost": events_cost(global_rank, world_size, model),
    }
