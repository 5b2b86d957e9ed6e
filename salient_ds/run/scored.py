"""Loads what ``salient-ds evaluate`` scores: the model with its adapter, and the rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salient_ds.config.run import ModelConfig
from salient_ds.config.train import TrainConfig
from salient_ds.data.tasks.dataset import load_task
from salient_ds.models.heads import pad_with
from salient_ds.models.loading import attention_for, load_base, load_tokenizer
from salient_ds.run.applying import add_adapter, add_checkpoint
from salient_ds.run.export import newest_checkpoint
from salient_ds.run.inputs import Inputs, task_collator
from salient_ds.run.places import unreachable
from salient_ds.run.targets import Target, is_adapter


@dataclass(frozen=True)
class Loaded:
    """A model to score, in evaluation mode."""

    tokenizer: Any
    base: nn.Module
    """The model of transformers, which says what inputs it takes."""
    model: Any
    """The same with its adapter."""
    notes: list[str]
    """For the user."""


def load_target(target: Target, device: torch.device) -> Loaded:
    """The model of ``target`` with its adapter, on ``device``.

    Raises:
        ValueError: base, adapter and task do not belong together.
        CheckpointError: a run has no whole checkpoint.
    """
    own = {key: value for key, value in target.model.items() if key not in ("path", "task", "random_weights")}
    model = ModelConfig(path=target.base, task=target.task.head, **own)
    sizes = {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "lr": 1.0}  # of no training
    train = TrainConfig.model_validate(sizes | {"precision": target.precision})
    problem = unreachable(target.base, model.revision)
    if problem is not None:
        raise ValueError(f"{problem}: give its directory (--base)")
    try:
        if "attn_implementation" not in own:
            model = model.model_copy(update={"attn_implementation": attention_for(model)})
        tokenizer = load_tokenizer(model)
        loaded = load_base(model, train, {}, target.task.label_names or ())
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the model {target.base!r} cannot be loaded ({reason}): give its directory (--base)"
        ) from error
    adapted: nn.Module = loaded.model
    notes: list[str] = []
    if target.kind == "run":
        folder = Path(target.place)
        if is_adapter(folder / "adapter"):
            adapted = add_adapter(loaded.model, folder / "adapter")
        else:
            checkpoint = newest_checkpoint(folder)
            add_checkpoint(loaded.model, checkpoint, target.shortcut_norm)
            notes.append(f"the run is not finished: scored as of {checkpoint.name}")
    elif target.kind == "adapter":
        adapted = add_adapter(loaded.model, Path(target.place).expanduser())
    elif loaded.fresh:
        notes.append(f"{target.place} has no head for this task: it was scored with random values")
    pad_with(loaded.model, tokenizer.pad_token_id)
    return Loaded(tokenizer, loaded.model, adapted.to(device).eval(), notes)


def load_rows(target: Target, tokenizer: Any, limit: int | None) -> tuple[Inputs, list[str]]:
    """The rows to score, tokenised."""
    data, report = load_task(
        target.task, target.data, tokenizer, target.max_length, training=False, labelled=target.labelled,
        limit=None if target.held_out is not None else limit,
    )  # fmt: skip
    notes = report.notes("data")
    if target.held_out is not None:
        data = data.split(*target.held_out)[1]
        data = data.select(range(min(limit, len(data.examples)))) if limit is not None else data
    return Inputs(data, data, task_collator(target.task, tokenizer), None, notes, target.task), notes
