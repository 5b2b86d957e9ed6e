"""Checkpoints of the trainable state that any ZeRO stage and process count can read.

Every process writes the elements it owns (fp32 masters, Adam moments, statistics), named by parameter and first
element. A reader asks for any range of elements and gets it from whichever files hold it. DeepSpeed's own format is not
used, because it is tied to ZeRO stage and process count. Its universal form loses the step count of several parameter
groups at stage 3.

A checkpoint is *whole* once its directory has its final name. It is written as ``step-N.partial``, checked on all
processes, listed with the sha256 of every file in ``manifest.json`` and renamed. A failed or killed save leaves earlier
checkpoints untouched. Values that are not finite are never saved.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.engine.identity import Comparison, compare, completed
from salient_ds.engine.restore import restore
from salient_ds.engine.sealing import Written, make_folder, remove_others, seal, tensor_pieces, write_file
from salient_ds.engine.shard_files import (
    CheckpointError,
    ShardReader,
    damage,
    find_checkpoints,
    part_name,
    shard_key,
)
from salient_ds.engine.state import AllocationState
from salient_ds.ranks import RankDecision
from salient_ds.zero.collectives import all_succeeded, from_everyone, world
from salient_ds.zero.internals.engine_state import describe


def save(
    state: AllocationState,
    folder: Path,
    identity: dict[str, Any],
    extra: dict[str, Any],
    keep: int,
    spare: int | None = None,
) -> Path:
    """Write one checkpoint. All processes call this after a step.

    Checkpoints of later steps are removed afterwards: they are of a run that was not continued.

    Args:
        folder: the run's ``checkpoints`` directory, on a file system that all processes share.
        identity: facts that must be the same in a run that resumes from it (method, model, layout).
        extra: small state of the training loop, equal on all processes.
        keep: how many whole checkpoints to keep.
        spare: step of a further one to keep.

    Returns:
        The directory of the new checkpoint.

    Raises:
        CheckpointError: on all processes, if any of them could not write (disk full), or holds a value that is not
            finite; older checkpoints survive.
    """
    global_rank, world_size = world()
    final = folder / f"step-{state.step:08d}"
    partial = folder / f"step-{state.step:08d}.partial"
    broken = _first(from_everyone(not_finite(state)))
    if broken is not None:
        raise CheckpointError(
            f"checkpoint of step {state.step} was not written, because {broken}; {_last_whole(folder)}. Go on from the "
            "last whole one, if there is one, with a lower train.lr: train.lr=VALUE --resume auto --change train.lr"
        )
    if global_rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
    failure: str | None = None
    written: Written = {}
    if all_succeeded(make_folder(partial), state.device):
        try:
            written = _write(state, partial, extra)
        except Exception as error:  # torch and safetensors have error types of their own for a full disk
            failure = str(error) or type(error).__name__
    else:
        failure = f"cannot create {partial}"
    reports = from_everyone((failure, written))
    failure = _first([failed for failed, _ in reports])
    if failure is None:
        if global_rank == 0:
            failure = seal(partial, final, _manifest(state, identity), [files for _, files in reports])
        failure = _first(from_everyone(failure))
    if failure is not None:
        if global_rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        all_succeeded(True, state.device)  # wait for the removal before any process looks for checkpoints
        raise CheckpointError(
            f"checkpoint of step {state.step} was not written ({failure}); {_last_whole(folder)}. "
            f"Free space under {folder} and continue with --resume auto"
        )
    if global_rank == 0:
        remove_others(folder, state.step, keep, spare)
    return final


def _last_whole(folder: Path) -> str:
    whole = find_checkpoints(folder)
    return f"the last whole one is {whole[-1]}" if whole else "there is no earlier one"


def _first(answers: list[Any]) -> Any:
    """The first answer that is not None; None if there is none."""
    return next((answer for answer in answers if answer is not None), None)


def not_finite(state: AllocationState) -> str | None:
    """Which tensor of this process holds a value that is not finite, as a clause; None if all are finite.

    Masters and moments are looked at, and the device is waited for only once.
    """
    shards = state.shards
    tensors = [(f"the {kind} of {fragment.name}", tensor) for fragment in shards.layout.fragments
               for kind, tensor in {"master": shards.master(fragment), **shards.moments(fragment)}.items()]  # fmt: skip
    if not tensors or bool(torch.stack([tensor.isfinite().all() for _, tensor in tensors]).all()):
        return None
    name, tensor = next((name, tensor) for name, tensor in tensors if not bool(tensor.isfinite().all()))
    return f"{name} holds {int((~tensor.isfinite()).sum())} values that are NaN or infinite"


def _manifest(state: AllocationState, identity: dict[str, Any]) -> dict[str, Any]:
    return {
        "step": state.step,
        "processes": world().world_size,
        "identity": identity,
        "parameters": {n: list(shape) for n, shape in state.shards.shapes.items()},
        "adapters": _describe_adapters(state),
        "in_full": _describe_in_full(state),
    }


def _describe_in_full(state: AllocationState) -> list[dict[str, Any]]:
    """The parameters that are trained in full: name, shape, and all names, of which a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in state.adapted.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [
        {"name": name, "shape": list(state.shards.shapes[name]), "names": names[key]}
        for key, name in state.shards.in_full.items()
    ]


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


def _write(state: AllocationState, path: Path, extra: dict[str, Any]) -> Written:
    """Write the files of this process."""
    global_rank, world_size = world()
    tensors: dict[str, Tensor] = {}
    shards = state.shards
    if global_rank == 0 or not shards.replicated:
        for fragment in shards.layout.fragments:
            tensors[shard_key("master", fragment.name, fragment.lo)] = shards.master(fragment)
            for moment, value in shards.moments(fragment).items():
                tensors[shard_key(moment, fragment.name, fragment.lo)] = value
        for statistic, part, value in state.method.local_state():
            tensors[shard_key(statistic, part_name(part), part.lo)] = value
    name = f"shard-{global_rank:05d}-of-{world_size:05d}.safetensors"
    written = {name: write_file(path / name, tensor_pieces(tensors))}
    objects = {f"process-{global_rank:05d}.pt": _process_state(state)}
    if global_rank == 0:
        objects["shared.pt"] = _shared_state(state, extra)
    for name, facts in objects.items():
        buffer = BytesIO()
        torch.save(facts, buffer)
        written[name] = write_file(path / name, [buffer.getvalue()])
    return written


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


def load(state: AllocationState, path: Path, identity: dict[str, Any], changes: Collection[str] = ()) -> dict[str, Any]:
    """Restore everything that :func:`save` wrote and return its ``extra``. All processes call this.

    Random state is restored only on the number of processes that saved it.

    Args:
        identity: of this run.
        changes: keys of :data:`salient_ds.engine.identity.CHANGEABLE` whose value of this run is to be used from here
            on, although the checkpoint has another.

    Raises:
        CheckpointError: the checkpoint is damaged, or another method, model or adapter shape wrote it (the message
            names the differences).
    """
    global_rank, world_size = world()
    problem = _first(from_everyone(damage(path, contents=True, share=(global_rank, world_size))))
    if problem is not None:
        raise CheckpointError(f"damaged checkpoint: {problem}; take an older one, or restore the file")
    reader = ShardReader(path, contents=False)
    found = compare_with(reader, identity)
    problem = found.refusal(path, changes) or _other_shapes(reader.manifest, state, path)
    if problem is not None:
        raise CheckpointError(problem)
    shared = reader.shared()
    restore(state.engine, state.shards, shared, reader.read, renewed=[item.key for item in found.changed(changes)])
    state.step = shared["step"]
    decisions = state.decisions
    decisions.latest, held = RankDecision(**shared["latest"]), RankDecision(**shared["held"])
    decisions.pending = [RankDecision(**d) for d in shared["pending"]]
    if held.digest() != decisions.held.digest():
        decisions.apply(held)
    state.method.load_state(shared["method"], reader.read_part)
    if world_size == reader.manifest["processes"]:
        process = reader.process(global_rank)
        torch.set_rng_state(process["cpu_rng"])
        if "cuda_rng" in process and state.device.type == "cuda":
            torch.cuda.set_rng_state(process["cuda_rng"], state.device)
    extra: dict[str, Any] = shared["extra"]
    return extra


def compare_with(reader: ShardReader, identity: dict[str, Any]) -> Comparison:
    """Compare the identity in a checkpoint with (the known parts of) this run's."""
    saved = reader.manifest["identity"]
    if "train" in identity and "train" not in saved:  # of an older version
        saved = completed(saved, reader.shared()["groups"])
    return compare(saved, identity)


def _other_shapes(manifest: dict[str, Any], state: AllocationState, path: Path) -> str | None:
    shapes = {n: list(shape) for n, shape in state.shards.shapes.items()}
    if shapes == manifest["parameters"]:
        return None
    names = shapes.keys() | manifest["parameters"].keys()
    changed = sorted(n for n in names if shapes.get(n) != manifest["parameters"].get(n))
    return (
        f"{path} belongs to another run (trainable parameters differ, for example {changed[:3]}): resume with the "
        "configuration it was made with, or choose another output_dir"
    )


def kept_rows(path: Path) -> Tensor:
    """Which rows of the initial layout a checkpoint holds (bool, CPU).

    Rows are missing if it was saved after a compaction, or while rows were still to be added in flight.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    kept: Tensor = ShardReader(path, contents=False).shared()["kept"]
    return kept
