"""Decides whether a run may resume, and from which checkpoint, before the base is loaded and any file is written."""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salient_ds.config.run import RunConfig
from salient_ds.engine.checkpoint import compare_with
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.engine.identity import DATA_SETTINGS
from salient_ds.engine.shard_files import (
    MANIFEST,
    CheckpointError,
    ShardReader,
    choose_whole,
    damage,
    find_checkpoints,
    step_of,
)
from salient_ds.models.fingerprint import base_identity
from salient_ds.models.loading import model_identity
from salient_ds.monitor.directory import RunDirectory, RunDirectoryError, claim, shared_by_all
from salient_ds.run.assemble import compaction
from salient_ds.run.inputs import Inputs
from salient_ds.zero.collectives import all_succeeded, from_main, world


def choose_start(folder: Path, resume: str, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from; None: begin from the first step. Contents are verified.

    Args:
        folder: the run's ``checkpoints`` directory.
        resume: "never", "auto" (the last whole checkpoint in ``folder``), or the path of a checkpoint.
        say: is told which checkpoints are damaged, and how.

    Raises:
        CheckpointError: the given checkpoint is damaged or does not exist, or there are only damaged ones.
    """
    if resume == "never":
        return None
    if resume != "auto":
        path = Path(resume)
        if not (path / MANIFEST).is_file():
            raise CheckpointError(
                f"--resume {resume} is no checkpoint (it holds no {MANIFEST}): give auto, or a directory such as "
                f"{folder / 'step-00000100'}"
            )
        problem = damage(path, contents=True)
        if problem is not None:
            raise CheckpointError(f"checkpoint {path} is damaged ({problem}): choose another one, or --resume auto")
        return path
    return choose_whole(folder, say)


def open_run(
    path: Path, resume: str, overwrite: bool, device: torch.device, say: Callable[[str], None]
) -> tuple[RunDirectory, Path | None]:
    """Claim the run directory on the main process, and agree with all processes on the checkpoint to resume.

    Returns:
        The directory, which only the main process holds locked, and the checkpoint.

    Raises:
        RunDirectoryError: on all processes, if the directory is taken, or not shared by all nodes, or if there is no
            whole checkpoint to resume.
    """
    is_main = world().global_rank == 0
    problem, start, token = None, None, secrets.token_hex(8)
    directory = RunDirectory(path)
    if is_main:
        try:
            directory = claim(path, resume, overwrite)
            start = choose_start(directory.checkpoints, resume, say)
        except (RunDirectoryError, CheckpointError, OSError) as error:
            problem = str(error)
    problem, start, token = from_main([problem, start, token], device)
    if problem is not None:
        raise RunDirectoryError(problem)
    if is_main:
        shared_by_all(path, True, token)
    all_succeeded(True, device)  # the marker is written before any other process looks for it
    # the main process must not call shared_by_all again: it would write while others read
    if not all_succeeded(is_main or shared_by_all(path, False, token), device):
        raise RunDirectoryError(f"output_dir {path} is not on a file system that all nodes share: choose one that is")
    if is_main:
        (path / ".shared").unlink(missing_ok=True)
    return directory, start


_NO_ROWS = ("eval", "cache", "cache_dir", "workers")
"""Keys of section ``data`` that do not decide on which rows are trained."""


def run_identity(config: RunConfig, inputs: Inputs, total_steps: int, ds_config: dict[str, Any]) -> dict[str, Any]:
    """What must be equal in a checkpoint and in a run that resumes from it, as far as it is known without the base.

    Args:
        ds_config: resolved DeepSpeed settings.
    """
    train = config.train.model_dump(mode="json")
    same = ("lr", "lr_schedule", "lr_warmup", "weight_decay", "betas", "eps", "max_grad_norm", "precision",
            "neftune_alpha")  # fmt: skip
    method = config.method.resolved(ds_config["gradient_accumulation_steps"])
    optimizer = (ds_config.get("optimizer") or {}).get("params", {})
    return {
        "method": method.model_dump(mode="json", by_alias=True),
        "adapter": _adapter(config),
        **_head(config, inputs),
        "total_steps": total_steps,
        "data": inputs.train.fingerprint(),
        DATA_SETTINGS: {
            **{
                f"data.{key}": value
                for key, value in config.data.model_dump(mode="json").items()
                if key not in _NO_ROWS
            },
            "model.tokenizer": config.model.tokenizer,
        },
        "global_batch_size": config.train.global_batch_size,
        "seed": config.train.seed,
        "train": {key: train[key] for key in same} | _sigma_lr(config),
        # everything else in the section follows from section train, or is refused, or changes only the rounding
        "optimizer.params": {"bias_correction": optimizer.get("bias_correction", True)},
    }


def _adapter(config: RunConfig) -> dict[str, Any]:
    """Section ``adapter``. What concerns modules that are trained in full is left out of runs that have none."""
    section = config.adapter.model_dump(mode="json")
    if not config.adapter.rank_pattern:
        del section["rank_pattern"]  # older versions did not record it
    if not config.adapter.also_train:
        del section["also_train"]
    if config.model.task in ("causal-lm", "seq2seq-lm"):
        del section["train_head"]  # there is no head besides
    return section


def _head(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """The task and the names of its classes, for heads that earlier versions did not have."""
    if config.model.task == "causal-lm":
        return {}
    return {"model.task": config.model.task, "labels": list(inputs.labels)}


def _sigma_lr(config: RunConfig) -> dict[str, Any]:
    """``train.sigma_lr``, if there are singular values. It is 1 where "auto" stands for that."""
    chosen = config.train.sigma_lr
    if not config.has_singular_values:
        return {}
    return {"sigma_lr": 1.0 if chosen == "auto" and config.method.keeps_rates else chosen}


_KNOWN_ONCE_BUILT = ("model", "modules", "speed.compaction")


def built_identity(model: nn.Module, engine: AllocatingEngine, config: RunConfig, stage: int) -> dict[str, Any]:
    """The rest of :func:`run_identity`, which is known once the engine is built."""
    layout, method = engine.initial_layout, engine.method
    dropped = compaction(config, method, config.speed_plan(stage).packed)
    return {
        "model": model_identity(model),
        "modules": hashlib.sha256(json.dumps([layout.modules, layout.ranks]).encode()).hexdigest()[:16],
        # dropping rows that are gated out changes nothing
        "speed.compaction": "none" if method.policy.gate_forward else dropped,
    }


@dataclass
class Start:
    """How a run begins: afresh, from a checkpoint, or not at all. Equal on all processes."""

    step: int = 0
    """Steps that are done. The run is finished if ``nothing_to_do``."""
    nothing_to_do: bool = False
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Settings that change here: "step" (the last one with the old value), "key", "from", "to"."""
    notes: list[str] = field(default_factory=list)
    """Sentences for the user."""

    @property
    def changed_keys(self) -> list[str]:
        return [change["key"] for change in self.changes]


def accept(
    directory: RunDirectory, path: Path | None, identity: dict[str, Any], total_steps: int, changes: Sequence[str]
) -> Start:
    """Compare checkpoint ``path`` (None: there is none) with this run. Writes nothing.

    Args:
        identity: of this run, as far as it is known.
        changes: keys that the user allowed to differ.

    Raises:
        CheckpointError: something else differs, or the checkpoint is damaged.
    """
    options = " ".join(f"--change {key}" for key in changes)
    if path is None:
        none = f"{options} changes nothing, because {directory.checkpoints} holds no checkpoint yet"
        return Start(notes=[none] if changes else [])
    reader = ShardReader(path, contents=False)
    found = compare_with(reader, identity)
    problem = found.refusal(path, changes)
    if problem is not None:
        raise CheckpointError(problem)
    start = Start(step=reader.manifest["step"])
    changed = found.changed(changes)
    start.changes = [{"step": start.step, "key": c.key, "from": c.there, "to": c.here} for c in changed]
    if own_checkpoint(directory, path) and directory.finished_at(start.step):
        start.nothing_to_do = True
        early = f"; it stopped early, after step {start.step} (train.patience)" if start.step < total_steps else ""
        start.notes.append(f"nothing to do: the run of {total_steps} steps is finished{early}")
        return start
    equal = [key for key in changes if key not in start.changed_keys]
    start.notes += [f"--change {key} changes nothing, because {path} was made with the same value" for key in equal]
    missing = [item.key for item in found.unknown if item.key not in changes]
    missing += [key for key in _KNOWN_ONCE_BUILT if key not in reader.manifest["identity"]]
    if missing:
        start.notes.append(f"not compared, because {path} does not record them: {', '.join(missing)}")
    if start.changes:
        listed = ", ".join(f"{c.key} from {'a value not recorded' if c.there is None else repr(c.there)} to {c.here!r}"
                           for c in changed)  # fmt: skip
        start.notes.append(f"changed after step {start.step}: {listed}")
    later = [p.name for p in find_checkpoints(directory.checkpoints) if step_of(p) > start.step]
    if later:
        start.notes.append(f"checkpoints of later steps are removed at the next save: {', '.join(later)}")
    return start


def agree(
    directory: RunDirectory,
    path: Path | None,
    config: RunConfig,
    identity: dict[str, Any],
    total_steps: int,
    changes: Sequence[str],
    device: torch.device,
) -> tuple[dict[str, Any], Start]:
    """Call :func:`accept` on the main process, and tell all processes what came out.

    Returns:
        What identifies the base model, and how the run begins.

    Raises:
        CheckpointError: on all processes, if the run may not resume.
    """
    problem, base, start = None, {}, Start()
    if world().global_rank == 0:
        try:
            base = base_identity(config.model, config.train.seed)
            start = accept(directory, path, identity | base, total_steps, changes)
        except (CheckpointError, OSError, ValueError) as error:
            problem = str(error)
    problem, base, start = from_main([problem, base, start], device)
    if problem is not None:
        raise CheckpointError(problem)
    return base, start


def base_of(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """What identifies the base model, as the main process sees it, on all processes."""
    found = base_identity(config.model, config.train.seed) if world().global_rank == 0 else {}
    answer: dict[str, Any] = from_main([found], device)[0]
    return answer


def own_checkpoint(directory: RunDirectory, path: Path) -> bool:
    """Whether ``path`` is a checkpoint of the run in ``directory``."""
    return path.resolve().parent == directory.checkpoints.resolve()


def ways_on(folder: Path) -> str:
    """How to continue a run whose numbers are not finite any more, as a clause. ``folder`` holds its checkpoints."""
    found = find_checkpoints(folder)
    if not found:
        return "no checkpoint was saved yet: begin again with a lower train.lr and --overwrite"
    return (
        f"the last whole checkpoint is {found[-1]}: go on from there with a lower learning rate (train.lr=VALUE "
        "--resume auto --change train.lr)"
    )
