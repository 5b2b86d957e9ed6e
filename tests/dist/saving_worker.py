"""Checkpoints that are written while training goes on."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import torch

from salient_ds.config.train import TrainConfig
from salient_ds.engine import saving
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.engine.shard_files import CheckpointError, ShardReader
from salient_ds.run.keeping import BUSY, Keeper
from salient_ds.zero import frozen
from tests.dist import scenario
from tests.dist.scenario import Case

FROZEN = [Case(2), Case(3, speed={"zero3": "sharded_base"}), Case(3)]
"""A base that is whole, one that this package partitions, and one that DeepSpeed partitions."""


def keeper_of(engine: AllocatingEngine, folder: Path, **train: Any) -> Keeper:
    sizes = {"max_steps": 16, "global_batch_size": 4, "micro_batch_size": 1, "lr": 0.1}
    return Keeper(engine, folder, TrainConfig.model_validate(sizes | train), {"method": "test"}, clock=lambda: 0.0)


def step(engine: AllocatingEngine, keeper: Keeper, global_rank: int, world_size: int) -> bool:
    """Train one step as the loop does. Returns whether some process was busy with a checkpoint."""
    report = engine.train_step(*scenario.batches(engine.step, global_rank, world_size))
    keeper.after_step(report)
    return BUSY in report.raised


def while_writing(global_rank: int, world_size: int, model: Path, folder: Path, case: Case) -> dict[str, Any]:
    """The disk of the last process stands still for four steps, across an allocation event."""
    engine = scenario.build(case, model, world_size)
    scenario.advance(engine, 3, global_rank, world_size)
    expected = saving.save(engine.state, folder / "sync", {"method": "test"}, {"note": 1}, keep=2)
    keeper, real, released = keeper_of(engine, folder / "async"), saving.write_file, threading.Event()

    def stuck(*args: Any) -> Any:
        assert released.wait(120)
        return real(*args)

    if global_rank == world_size - 1:
        saving.write_file = stuck
    path = keeper.save({"note": 1}, None)
    assert keeper.save({"note": 1}, None) == path  # the same step
    busy = [step(engine, keeper, global_rank, world_size) for _ in range(4)]
    there = path.exists()
    released.set()
    keeper.wait()
    saving.write_file = real
    torch.distributed.barrier()
    mine, theirs = ShardReader(path), ShardReader(expected)
    same = [
        torch.equal(mine.read(kind, name, 0, numel), theirs.read(kind, name, 0, numel))
        for name, shape in theirs.manifest["parameters"].items()
        for kind, numel in [(k, int(torch.tensor(shape).prod())) for k in ("master", "exp_avg", "exp_avg_sq")]
    ]
    files = [{n: f["sha256"] for n, f in r.manifest["files"].items() if n.startswith("shard")} for r in (mine, theirs)]
    return {"busy": busy, "there": there, "same": all(same) and len(same) > 10, "equal": files[0] == files[1],
            "names": sorted(p.name for p in (folder / "async").iterdir())}  # fmt: skip


def full_disk_later(global_rank: int, world_size: int, model: Path, folder: Path) -> dict[str, Any]:
    """One process cannot write: all learn of it within a few steps, and what was whole stays."""
    engine = scenario.build(Case(2), model, world_size)
    keeper = keeper_of(engine, folder)
    scenario.advance(engine, 3, global_rank, world_size)
    keeper.save({}, None)
    keeper.wait()
    real = saving.write_file

    def full(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    if global_rank == 1:
        saving.write_file = full
    step(engine, keeper, global_rank, world_size)
    keeper.save({}, None)
    message = ""
    while not message:
        try:
            step(engine, keeper, global_rank, world_size)
        except CheckpointError as error:
            message = str(error)
    saving.write_file = real
    left = sorted(p.name for p in folder.iterdir())
    torch.distributed.barrier()
    step(engine, keeper, global_rank, world_size)  # all are at the same step
    keeper.save({}, None)
    keeper.wait()
    torch.distributed.barrier()
    return {"message": message, "left": left, "after": len(list(folder.glob("step-*"))), "step": engine.step}


def frozen_weights(global_rank: int, world_size: int, model: Path, folder: Path, case: Case) -> dict[str, Any]:
    """One frozen value of the last process changes after a save: no process writes the next checkpoint."""
    engine = scenario.build(case, model, world_size)
    keeper = keeper_of(engine, folder)
    scenario.advance(engine, 2, global_rank, world_size)
    keeper.save({}, None)
    keeper.wait()
    scenario.advance(engine, 5, global_rank, world_size)  # an event lies between
    keeper.save({}, None)
    keeper.wait()
    if global_rank == world_size - 1:
        held = frozen._held(engine.adapted.model)
        name = [name for name in held if name.startswith("part of ") or "mlp" in name][-1]
        held[name].view(-1)[3] += 1
    scenario.advance(engine, 6, global_rank, world_size)
    message = ""
    try:
        keeper.save({}, None)
        keeper.wait()
    except CheckpointError as error:
        message = str(error)
    return {"message": message, "left": sorted(p.name for p in folder.iterdir())}


def sizes(global_rank: int, world_size: int, model: Path, folder: Path) -> dict[str, Any]:
    """Bytes of a checkpoint before and after pruned rows are dropped, and of what it must hold."""
    case = Case(2, speed={"compaction": "last"})
    engine = scenario.build(case, model, world_size)
    found = {}
    for when, until in (("before", 3), ("after", 16)):
        scenario.advance(engine, until, global_rank, world_size)
        path = saving.save(engine.state, folder, {"method": "test"}, {}, keep=2)
        torch.distributed.barrier()
        manifest = ShardReader(path).manifest
        live = sum(int(torch.tensor(shape).prod()) for shape in manifest["parameters"].values())
        shards = sum(entry["bytes"] for name, entry in manifest["files"].items() if name.startswith("shard"))
        total = sum(file.stat().st_size for file in path.iterdir())
        found[when] = {"live": live, "shards": shards, "total": total, "names": list(manifest["parameters"])}
    base = sum(p.numel() for p in engine.adapted.model.parameters() if not p.requires_grad)
    return {"base": base, **found}


def everything(global_rank: int, world_size: int, model: Path, folder: Path, cases: list[Case]) -> dict[str, Any]:
    """All of the above in one process group."""
    return {
        "writing": [while_writing(global_rank, world_size, model, folder / str(k), c) for k, c in enumerate(cases)],
        "full": full_disk_later(global_rank, world_size, model, folder / "full"),
        "sizes": sizes(global_rank, world_size, model, folder / "sizes"),
        "frozen": [
            frozen_weights(global_rank, world_size, model, folder / f"frozen{k}", case) for k, case in enumerate(FROZEN)
        ],
    }
