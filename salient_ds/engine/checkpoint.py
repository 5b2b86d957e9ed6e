"""Checkpoints of the trainable state that any ZeRO stage and process count can read.

Every process writes the elements it owns (fp32 masters, Adam moments, statistics), named by parameter and first
element. A reader asks for any range of elements and gets it from whichever files hold it. DeepSpeed's own format is not
used, because it is tied to ZeRO stage and process count. Its universal form loses the step count of several parameter
groups at stage 3.

A checkpoint is *whole* once its directory has its final name. It is written as ``step-N.partial``, checked on all
processes, listed with the sha256 of every file in ``manifest.json`` and renamed. Values that are not finite are never
saved. :mod:`salient_ds.engine.saving` writes checkpoints; this file reads them.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.engine.identity import Comparison, compare, completed
from salient_ds.engine.restore import restore
from salient_ds.engine.saving import save
from salient_ds.engine.shard_files import CheckpointError, ShardReader, damage, find_checkpoints
from salient_ds.engine.state import AllocationState
from salient_ds.ranks import RankDecision
from salient_ds.zero.collectives import from_everyone, world

__all__ = ["CheckpointError", "ShardReader", "compare_with", "find_checkpoints", "kept_rows", "load", "save"]


def _first(answers: list[Any]) -> Any:
    """The first answer that is not None; None if there is none."""
    return next((answer for answer in answers if answer is not None), None)


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
