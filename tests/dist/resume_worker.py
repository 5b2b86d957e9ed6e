"""Stop in the middle of a window, start again from files, and compare with not stopping."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import torch

from salient_ds.config.run import RunConfig
from salient_ds.engine import checkpoint, saving
from salient_ds.engine.build import scheduler_factory
from salient_ds.engine.checkpoint import compare_with
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.engine.identity import CHANGEABLE
from salient_ds.zero.internals.engine_state import basic_optimizer
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
    real, messages = saving.write_file, []

    def full_disk(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if global_rank == 1:
        saving.write_file = full_disk
    try:
        checkpoint.save(engine.state, folder, IDENTITY, {}, keep=2)
    except checkpoint.CheckpointError as error:
        messages.append(str(error))
    saving.write_file = real
    after_failure = [p.name for p in checkpoint.find_checkpoints(folder)], sorted(p.name for p in folder.iterdir())
    try:
        checkpoint.load(engine.state, checkpoint.find_checkpoints(folder)[-1], IDENTITY | {"method": "other"})
    except checkpoint.CheckpointError as error:
        messages.append(str(error))
    torch.distributed.barrier()
    if global_rank == 0:  # of a run that went on from here, before this one resumed
        shutil.copytree(folder / "step-00000003", folder / "step-00000099")
    torch.distributed.barrier()
    for _ in range(3):  # old checkpoints go once newer ones are whole, and later ones too
        scenario.advance(engine, engine.step + 1, global_rank, world_size)
        checkpoint.save(engine.state, folder, IDENTITY, {}, keep=2)
    torch.distributed.barrier()
    return {
        "messages": messages,
        "after_failure": after_failure,
        "kept": [p.name for p in checkpoint.find_checkpoints(folder)],
    }


def not_finite(global_rank: int, world_size: int, model: Path, folder: Path) -> list[Any]:
    """One process has a master, then a moment, that is not finite."""
    engine = scenario.build(Case(2), model, world_size)
    scenario.advance(engine, 3, global_rank, world_size)
    found: list[Any] = []
    shards = engine.shards
    fragment = shards.layout.fragments[-1]
    for tensor, value in ((shards.master(fragment), float("nan")), (shards.moments(fragment)["exp_avg"], float("inf"))):
        whole = tensor.clone()
        if global_rank == 1:
            tensor[:2] = value
        try:
            checkpoint.save(engine.state, folder, IDENTITY, {}, keep=2)
        except checkpoint.CheckpointError as error:
            found.append(str(error))
        tensor.copy_(whole)
    torch.distributed.barrier()
    found.append(sorted(p.name for p in folder.iterdir()))
    torch.distributed.barrier()
    found.append(checkpoint.save(engine.state, folder, IDENTITY, {}, keep=2).name)
    return found


def settings(case: Case, model: Path) -> dict[str, Any]:
    """An identity of the settings that may change."""
    train = case.config(model).train
    return {"train": {key.partition(".")[2]: getattr(train, key.partition(".")[2]) for key in CHANGEABLE}}


def changed(
    global_rank: int, world_size: int, model: Path, pairs: list[tuple[Case, Case]], folder: Path
) -> list[dict[str, Any]]:
    """Each first case is stopped, and goes on as the second one. So does one that is changed by hand in mid-run."""
    results = []
    for index, (before, after) in enumerate(pairs):
        engine = scenario.build(before, model, world_size)
        scenario.advance(engine, STOP, global_rank, world_size)
        path = checkpoint.save(engine.state, folder / str(index), settings(before, model), {}, keep=2)
        change_by_hand(engine, after.config(model), after.steps)
        by_hand = outcome(engine, *scenario.advance(engine, TOTAL_STEPS, global_rank, world_size))
        engine.engine.destroy()
        again = scenario.build(after, model, world_size)
        here = settings(after, model)
        found = compare_with(checkpoint.ShardReader(path), here)
        keys = [item.key for item in found.differences]
        refusals = []
        for allowed in ((), keys[1:]):
            try:
                checkpoint.load(again.state, path, here, allowed)
            except checkpoint.CheckpointError as error:
                refusals.append(str(error))
        checkpoint.load(again.state, path, here, keys)
        started = again.engine.get_lr()
        resumed = outcome(again, *scenario.advance(again, TOTAL_STEPS, global_rank, world_size))
        clipping = again.engine.gradient_clipping()
        groups = [{k: g[k] for k in ("name", "lr", "betas", "eps", "weight_decay")}
                  for g in basic_optimizer(again.engine).param_groups]  # fmt: skip
        again.engine.destroy()
        results.append({"by_hand": by_hand, "resumed": resumed, "keys": keys, "refusals": refusals,
                        "groups": groups, "clipping": clipping, "started": started})  # fmt: skip
    return results


def change_by_hand(engine: AllocatingEngine, config: RunConfig, steps: int) -> None:
    """Give a running engine other hyperparameters, and its schedule for the step it is at."""
    train, ratio = config.train, config.sigma_ratio(engine.initial_layout)
    optimizer, schedule = basic_optimizer(engine.engine), engine.engine.lr_scheduler
    other = torch.optim.AdamW([torch.zeros(1)], lr=train.lr)
    factor = scheduler_factory(train, steps)(other).lr_lambdas[0]  # type: ignore[attr-defined]
    peaks = {"factors": train.lr, "singular_values": train.lr * ratio}
    schedule.base_lrs = [peaks[group["name"]] for group in optimizer.param_groups]
    schedule.lr_lambdas = [factor for _ in schedule.lr_lambdas]
    for group in optimizer.param_groups:
        decay = train.weight_decay if group["name"] == "factors" else 0.0
        group.update(
            lr=peaks[group["name"]] * factor(engine.step), betas=train.betas, eps=train.eps, weight_decay=decay
        )


def older(global_rank: int, world_size: int, model: Path, path: Path) -> dict[str, Any]:
    """Resume from a checkpoint of format 1."""
    case = Case(1)
    engine = scenario.build(case, model, world_size)
    here = settings(case, model)
    here["train"]["sigma_lr"] = 1.0  # what all runs had, as far as such a checkpoint tells
    extra = checkpoint.load(engine.state, path, IDENTITY | here)
    step = engine.step
    losses, _ = scenario.advance(engine, TOTAL_STEPS, global_rank, world_size)
    here["train"]["lr"] = 0.5
    try:
        checkpoint.load(engine.state, path, IDENTITY | here)
        message = ""
    except checkpoint.CheckpointError as error:
        message = str(error)
    return {"extra": extra, "step": step, "losses": losses, "message": message}
