"""Checkpoints of the trainable state that any ZeRO stage and process count can read.

Every process writes the elements it owns (fp32 masters, Adam moments, statistics), named by parameter and first
element. A reader asks for any range of elements and gets it from whichever files hold it. DeepSpeed's own format is not
used, because it is tied to ZeRO stage and process count. Its universal form loses the step count of several parameter
groups at stage 3.

A checkpoint is *whole* once its directory has its final name. It is written as ``step-N.partial``, checked on all
processes, listed in ``manifest.json`` and renamed. A failed or killed save leaves earlier checkpoints untouched.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from salient_ds.engine.restore import restore
from salient_ds.engine.shard_files import (
    FORMAT,
    CheckpointError,
    ShardReader,
    find_checkpoints,
    part_name,
    shard_key,
)
from salient_ds.engine.state import AllocationState
from salient_ds.ranks import RankDecision
from salient_ds.zero.collectives import all_succeeded, world
from salient_ds.zero.internals.engine_state import describe


def save(state: AllocationState, folder: Path, identity: dict[str, Any], extra: dict[str, Any], keep: int) -> Path:
    """Write one checkpoint. All processes call this after a step.

    Args:
        folder: the run's ``checkpoints`` directory, on a file system that all processes share.
        identity: facts that must be the same in a run that resumes from it (method, model, layout).
        extra: small state of the training loop, equal on all processes.
        keep: how many whole checkpoints to keep.

    Returns:
        The directory of the new checkpoint.

    Raises:
        CheckpointError: on all processes, if any of them could not write (disk full); older checkpoints survive.
    """
    global_rank, world_size = world()
    final = folder / f"step-{state.step:08d}"
    partial = folder / f"step-{state.step:08d}.partial"
    if global_rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    failure: OSError | None = None
    if all_succeeded(_try_mkdir(partial), state.device):
        try:
            _write_shard(state, partial, global_rank, world_size)
            if global_rank == 0:
                torch.save(_shared_state(state, extra), partial / "shared.pt")
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            failure = error if isinstance(error, OSError) else OSError(str(error))
        except Exception as error:  # safetensors has its own error type for I/O
            failure = OSError(str(error))
    else:
        failure = OSError(f"cannot create {partial}")
    written = all_succeeded(failure is None, state.device)
    if written and global_rank == 0:
        failure = _seal(partial, final, identity, state, world_size)
    if not all_succeeded(failure is None, state.device):
        if global_rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        all_succeeded(True, state.device)  # wait for the removal before any process looks for checkpoints
        whole = find_checkpoints(folder)
        last = f"the last whole one is {whole[-1]}" if whole else "there is no earlier one"
        raise CheckpointError(
            f"checkpoint of step {state.step} was not written ({failure or 'another process failed'}); {last}. "
            f"Free space under {folder} and continue with --resume auto"
        )
    if global_rank == 0:
        for old in find_checkpoints(folder)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _try_mkdir(path: Path) -> bool:
    try:
        path.mkdir(parents=True, exist_ok=True)
        return True
    except OSError:
        return False


def _seal(
    partial: Path, final: Path, identity: dict[str, Any], state: AllocationState, world_size: int
) -> OSError | None:
    try:
        files = {p.name: p.stat().st_size for p in sorted(partial.iterdir())}
        manifest = {
            "format": FORMAT,
            "step": state.step,
            "processes": world_size,
            "identity": identity,
            "parameters": {n: list(shape) for n, shape in state.shards.shapes.items()},
            "adapters": _describe_adapters(state),
            "files": files,
        }
        with open(partial / "manifest.json", "w") as out:
            json.dump(manifest, out, indent=1)
            out.flush()
            os.fsync(out.fileno())
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        return None
    except OSError as error:
        return error


def _describe_adapters(state: AllocationState) -> list[dict[str, Any]]:
    """What an export must know about every adapter, since it has no model: path, scaling, form and factor names."""
    return [
        {
            "name": name,
            "form": type(adapter).__name__,
            "drops_masked": adapter.drops_masked,
            "rank": adapter.rank,
            "scaling": adapter.scaling,
            "factors": {factor: f"{name}.lora_{factor}" for factor in adapter.factors()},
            "shapes": {f: list(a.shape) for f, a in adapter.factors().items()},
        }
        for name, adapter in state.adapted.adapters.items()
    ]


def _write_shard(state: AllocationState, path: Path, global_rank: int, world_size: int) -> None:
    tensors: dict[str, Tensor] = {}
    shards = state.shards
    if global_rank == 0 or not shards.replicated:
        for fragment in shards.layout.fragments:
            tensors[shard_key("master", fragment.name, fragment.lo)] = shards.master(fragment)
            for moment, value in shards.moments(fragment).items():
                tensors[shard_key(moment, fragment.name, fragment.lo)] = value
        for statistic, part, value in state.method.local_state():
            tensors[shard_key(statistic, part_name(part), part.lo)] = value
    name = path / f"shard-{global_rank:05d}-of-{world_size:05d}.safetensors"
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, name)
    torch.save(_process_state(state), path / f"process-{global_rank:05d}.pt")
    for written in (name, path / f"process-{global_rank:05d}.pt"):
        with open(written, "rb") as handle:
            os.fsync(handle.fileno())


def _process_state(state: AllocationState) -> dict[str, Any]:
    found: dict[str, Any] = {"cpu_rng": torch.get_rng_state()}
    if state.device.type == "cuda":
        found["cuda_rng"] = torch.cuda.get_rng_state(state.device)
    return found


def _shared_state(state: AllocationState, extra: dict[str, Any]) -> dict[str, Any]:
    decisions = state.decisions
    return {
        "step": state.step,
        "kept": state.kept_N,
        "latest": _pack(decisions.latest),
        "held": _pack(decisions.held),
        "pending": [_pack(d) for d in decisions.pending],
        "method": state.method.shared_state(),
        **describe(state.engine),
        "extra": extra,
    }


def _pack(decision: RankDecision) -> dict[str, Any]:
    return {k: getattr(decision, k) for k in ("step", "budget", "mask_N", "threshold", "hold")}


def load(state: AllocationState, path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Restore everything that :func:`save` wrote and return its ``extra``.

    Random state is restored only on the number of processes that saved it.

    Raises:
        CheckpointError: the checkpoint is damaged, or another method, model or adapter shape wrote it (the message
            names the differences).
    """
    reader = ShardReader(path)
    _check_identity(reader.manifest, identity, state, path)
    shared = reader.shared()
    restore(state.engine, state.shards, shared, reader.read)
    state.step = shared["step"]
    decisions = state.decisions
    decisions.latest, held = RankDecision(**shared["latest"]), RankDecision(**shared["held"])
    decisions.pending = [RankDecision(**d) for d in shared["pending"]]
    if held.digest() != decisions.held.digest():
        decisions.apply(held)
    state.method.load_state(shared["method"], reader.read_part)
    global_rank, world_size = world()
    if world_size == reader.manifest["processes"]:
        process = reader.process(global_rank)
        torch.set_rng_state(process["cpu_rng"])
        if "cuda_rng" in process and state.device.type == "cuda":
            torch.cuda.set_rng_state(process["cuda_rng"], state.device)
    extra: dict[str, Any] = shared["extra"]
    return extra


def kept_rows(path: Path) -> Tensor:
    """Which rows of the initial layout a checkpoint holds (bool, CPU).

    Rows are missing if it was saved after a compaction, or while rows were still to be added in flight.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    kept: Tensor = ShardReader(path).shared()["kept"]
    return kept


def _check_identity(manifest: dict[str, Any], identity: dict[str, Any], state: AllocationState, path: Path) -> None:
    saved = manifest["identity"]
    wrong = [f"{k}: {saved.get(k)!r} there, {v!r} here" for k, v in identity.items() if saved.get(k) != v]
    shapes = {n: list(shape) for n, shape in state.shards.shapes.items()}
    if not wrong and shapes != manifest["parameters"]:
        names = shapes.keys() | manifest["parameters"].keys()
        changed = sorted(n for n in names if shapes.get(n) != manifest["parameters"].get(n))
        wrong.append(f"trainable parameters differ, for example {changed[:3]}")
    if wrong:
        raise CheckpointError(
            f"{path} belongs to another run ({'; '.join(wrong)}): resume with the configuration it was made with, or "
            "choose another output_dir"
        )
