"""From files to micro-batches: the part of a run that brings data, tokenizer and template or task together."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from salient_ds.config.run import RunConfig
from salient_ds.config.train import TrainConfig
from salient_ds.data.chat_source import fixed_date_note
from salient_ds.data.collate import Collator, pad_token_id
from salient_ds.data.record import TemplateRecord, template_record
from salient_ds.data.sampler import StepSampler
from salient_ds.data.shares import Share
from salient_ds.data.tasks.base import Task
from salient_ds.data.tasks.collate import TaskCollator
from salient_ds.data.tasks.dataset import TaskDataset, load_task
from salient_ds.data.templates import get_template
from salient_ds.engine.reports import MicroBatch
from salient_ds.heterolora.probe import ProbeData
from salient_ds.models.target_head import INDEX, target_index, uses_target_head
from salient_ds.models.varlen_attention import BORDERS, borders, uses_varlen_attention
from salient_ds.run.training_rows import read_training_rows
from salient_ds.steps import total_steps

Extra = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""A model's input that is made from the others, on the CPU."""


@dataclass(frozen=True)
class _Known:
    """A collator without the columns that a model does not take."""

    collator: Any
    takes: frozenset[str]

    @property
    def pad_token_id(self) -> int:
        return int(self.collator.pad_token_id)

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in self.collator(items).items() if name in self.takes}


class TrainingData(Protocol):
    """What training needs of a data set: of instructions, or of a task with a metric."""

    @property
    def num_targets(self) -> np.ndarray:
        """What each row counts in a mean loss."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def fingerprint(self) -> str:
        """Equal if and only if rows and their order are equal."""
        ...


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads besides the model."""

    train: TrainingData
    held_out: TrainingData | None
    collator: Collator | TaskCollator | _Known
    record: TemplateRecord | None
    """Of the template; None for tasks, which have none."""
    notes: list[str]
    """Lines for the log that say what was truncated or dropped."""
    task: Task | None = None
    """The task with a metric; None for instructions."""
    shares: tuple[Share, ...] = ()
    """What an epoch takes of each of several data sets; empty for one set, of which it takes every row once."""

    def for_model(self, model: Any) -> Inputs:
        """The same for a model that does not take everything that the tokenizer gives, such as token_type_ids."""
        if self.task is None:
            return self
        takes = frozenset(inspect.signature(model.forward).parameters)
        return replace(self, collator=_Known(self.collator, takes))

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; empty if there are none."""
        return (self.task.label_names or ()) if self.task is not None else ()

    @property
    def scored(self) -> TaskDataset | None:
        """The held-out data, if it has a metric."""
        return self.held_out if isinstance(self.held_out, TaskDataset) else None

    @property
    def rows_per_epoch(self) -> int:
        """Rows of an epoch, as weights of data sets make it."""
        return sum(share.per_epoch for share in self.shares) if self.shares else len(self.train)

    def sampler(self, train: TrainConfig) -> StepSampler:
        """Which rows each step takes."""
        return StepSampler(self.rows_per_epoch, train.global_batch_size, train.seed, self.shares)

    def total_steps(self, run: RunConfig) -> int:
        """Optimizer steps of the run: max_steps, or as many as its epochs take (the last batch is filled from the
        next epoch)."""
        if run.train.max_steps is not None:
            return run.train.max_steps
        assert run.train.epochs is not None
        return total_steps(self.rows_per_epoch, run.train.global_batch_size, run.train.epochs)


def load_inputs(run: RunConfig, tokenizer: Any) -> Inputs:
    """Read, render and tokenise the run's data. Deterministic: the result is the same on every process."""
    data = run.data
    if data.task is not None:
        return _task_inputs(data.task, run, tokenizer)
    template = get_template(data.template, data.rewritten_history)
    rows = read_training_rows(data, run.train.seed, tokenizer, template)
    date = fixed_date_note(tokenizer) if data.template == "tokenizer" else None
    notes = [*rows.notes, date] if date else rows.notes
    fill_to = run.data.max_length if run.speed.cuda_graphs else 0
    collator = Collator(pad_token_id(tokenizer), attn_implementation=run.model.attn_implementation, fill_to=fill_to)
    record = template_record(template, tokenizer)
    return Inputs(rows.train, rows.held_out, collator, record, notes, shares=rows.shares)


def _task_inputs(task: Task, run: RunConfig, tokenizer: Any) -> Inputs:
    """The data of a task with a metric."""
    data = run.data
    splits = data.eval is None and data.eval_size > 0
    common: dict[str, Any] = {"bad_rows": data.bad_rows}
    # what is held out of the training data must be decoded too
    train, report = load_task(task, data.sets[0].path, tokenizer, data.max_length, training=not splits, **common)
    notes, held_out = report.notes("train"), None
    if data.eval is not None:
        held_out, report = load_task(task, data.eval, tokenizer, data.max_length, training=False, **common)
        notes += report.notes("eval")
    elif splits:
        train, held_out = train.split(data.eval_size, run.train.seed)
    return Inputs(train, held_out, task_collator(task, tokenizer), None, notes, task)


def task_collator(task: Task, tokenizer: Any) -> TaskCollator:
    """Makes batches of a task's rows."""
    return TaskCollator(pad_token_id(tokenizer), task.padding_side)


def micro_batches(
    inputs: Inputs,
    sampler: StepSampler,
    batch: int,
    *,
    global_rank: int,
    world_size: int,
    size: int,
    device: torch.device,
    model: torch.nn.Module | None = None,
) -> tuple[list[MicroBatch], int]:
    """This process' micro-batches of one global batch, and the number of targets in the whole global batch.

    Args:
        batch: number of the global batch, counted from 0.
        size: examples per micro-batch.
        model: gets the positions of targets too if it computes logits there only (``speed.target_head``), and the
            borders of packed examples if it attends by them (``speed.packed_attention``).
    """
    everyone = sampler.indices(batch)
    extras: dict[str, Extra] = {}
    if model is not None and uses_target_head(model):
        extras[INDEX] = lambda batch: target_index(batch["labels"])
    if model is not None and uses_varlen_attention(model):
        extras[BORDERS] = lambda batch: borders(batch["position_ids"])
    parts = [
        _to_micro(inputs.train, inputs.collator, indices, device, extras)
        for indices in sampler.shard(batch, global_rank, world_size, size)
    ]
    return parts, int(inputs.train.num_targets[everyone].sum())


def evaluation_batches(
    inputs: Inputs, global_rank: int, world_size: int, size: int, device: torch.device
) -> Iterator[MicroBatch]:
    """Batches of ``size`` held-out rows for this process.

    Every process yields the same number of batches. Those without rows of their own repeat row 0 and count no target.
    """
    assert inputs.held_out is not None
    total = len(inputs.held_out)
    rounds = math.ceil(total / (size * world_size))
    for index in range(rounds):
        first = (index * world_size + global_rank) * size
        rows = np.arange(first, min(first + size, total))
        if len(rows):
            yield _to_micro(inputs.held_out, inputs.collator, rows, device)
        else:
            filler = _to_micro(inputs.held_out, inputs.collator, np.array([0]), device)
            yield MicroBatch(filler.inputs, 0, ())


def probe_data(inputs: Inputs, batches: int, size: int, device: torch.device) -> ProbeData:
    """The first ``batches`` batches of ``size`` rows of the training data, in the data set's own order.

    There are fewer if the data set is too small, but at least one.
    """
    rows = len(inputs.train)
    count = max(1, min(batches, rows // size))

    def batch(j: int) -> MicroBatch:
        return _to_micro(inputs.train, inputs.collator, np.arange(j * size, min((j + 1) * size, rows)), device)

    return ProbeData(count, batch)


def _to_micro(
    dataset: TrainingData,
    collator: Collator | TaskCollator | _Known,
    rows: np.ndarray,
    device: torch.device,
    extras: Mapping[str, Extra] | None = None,
) -> MicroBatch:
    batch = collator([dataset[int(i)] for i in rows])
    segments = _segments(batch["position_ids"]) if "position_ids" in batch else None
    batch = batch | {name: make(batch) for name, make in (extras or {}).items()}
    made = MicroBatch(batch, int(dataset.num_targets[rows].sum()), tuple(int(i) for i in rows), segments)
    return placed(made, device)


def placed(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """A micro-batch of host memory on the device. The copy is queued, and nothing waits for it."""
    inputs = batch.inputs
    if device.type == "cuda":  # a copy from memory that is not pinned waits for everything queued on the device
        inputs = {k: v.pin_memory() for k, v in inputs.items()}
    return replace(batch, inputs={k: v.to(device, non_blocking=True) for k, v in inputs.items()})


def _segments(position_BS: torch.Tensor) -> tuple[int, ...]:
    """Lengths of packed examples: each begins at position 0. Padding, which has position 0 too, counts as length 1."""
    begins = (position_BS == 0).reshape(-1).nonzero().reshape(-1)
    return tuple(torch.diff(begins, append=begins.new_tensor([position_BS.numel()])).tolist())
