"""Stop in the middle of a window, start again from files, and compare with not stopping."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import torch

from salient_ds.engine import checkpoint
from salient_ds.engine.engine import AllocatingEngine
from tests.dist import scenario
from tests.dist.scenario import TOTAL_STEPS, Case

STOP = 7  # two steps into the second window
IDENTITY = {"method": "test"}


def outcome(engine: AllocatingEngine, losses: list[float], decisions: list[Any]) -> dict[str, Any]:
    return {
        "losses": losses,
        "digests": [d.digest() for d in decisions],
        "state": scenario.local_state(engine),
        "lr": engine.engine.get_lr(),
        "loss_scale": float(getattr(engine.engine.optimizer, "loss_scale", None) or 1),
    }


def interrupted(
    global_rank: int, world_size: int, model: Path, cases: list[Case], folder: Path
) -> list[tuple[Any, Any]]:
    """(uninterrupted, stopped and resumed) per case."""
    pairs = []
    for index, case in enumerate(cases):
        engine = scenario.build(case, model, world_size)
        head = scenario.advance(engine, STOP, global_rank, world_size)
        checkpoint.save(engine.state, folder / str(index), IDENTITY, {"note": index}, keep=2)
        tail = scenario.advance(engine, TOTAL_STEPS, global_rank, world_size)
        engine.finish()
        whole = outcome(engine, head[0] + tail[0], head[1] + tail[1])
        engine.engine.destroy()
        again = resume(case, model, folder / str(index), global_rank, world_size)
        again["losses"] = head[0] + again["losses"]
        again["digests"] = [d.digest() for d in head[1]] + again["digests"]
        pairs.append((whole, again))
    return pairs


def resume(case: Case, model: Path, folder: Path, global_rank: int, world_size: int) -> dict[str, Any]:
    engine = scenario.build(case, model, world_size)
    torch.manual_seed(999)  # whatever state the new process has, the checkpoint's counts
    (found,) = checkpoint.find_checkpoints(folder)
    extra = checkpoint.load(engine.state, found, IDENTITY)
    assert engine.step == STOP and "note" in extra
    result = outcome(engine, *scenario.advance(engine, TOTAL_STEPS, global_rank, world_size))
    engine.finish()
    result["state"] = scenario.local_state(engine)
    engine.engine.destroy()
    return result


def resume_elsewhere(
    global_rank: int, world_size: int, model: Path, jobs: list[tuple[Case, Path]]
) -> list[dict[str, Any]]:
    """Checkpoints that other stages and process counts wrote."""
    return [resume(case, model, folder, global_rank, world_size) for case, folder in jobs]


def failing_save(global_rank: int, world_size: int, model: Path, folder: Path) -> dict[str, Any]:
    """One process runs out of disk while it saves; then the identity does not match."""
    engine = scenario.build(Case(2), model, world_size)
    scenario.advance(engine, 3, global_rank, world_size)
    checkpoint.save(engine.state, folder, IDENTITY, {}, keep=2)
    scenario.advance(engine, 5, global_rank, world_size)
    real, messages = checkpoint.save_file, []

    def full_disk(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if global_rank == 1:
        checkpoint.save_file = full_disk
    try:
        checkpoint.save(engine.state, folder, IDENTITY, {}, keep=2)
    except checkpoint.CheckpointError as error:
        messages.append(str(error))
    checkpoint.save_file = real
    after_failure = [p.name for p in checkpoint.find_checkpoints(folder)], sorted(p.name for p in folder.iterdir())
    try:
        checkpoint.load(engine.state, checkpoint.find_checkpoints(folder)[-1], IDENTITY | {"method": "other"})
    except checkpoint.CheckpointError as error:
        messages.append(str(error))
    torch.distributed.barrier()
    for _ in range(3):  # old checkpoints go once newer ones are whole
        scenario.advance(engine, engine.step + 1, global_rank, world_size)
        checkpoint.save(engine.state, folder, IDENTITY, {}, keep=2)
    torch.distributed.barrier()
    return {
        "messages": messages,
        "after_failure": after_failure,
        "kept": [p.name for p in checkpoint.find_checkpoints(folder)],
    }
