"""The examples of a task as inputs for a model, in a few flat arrays. numpy only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from salient_ds.data.conversation import OnBadRow
from salient_ds.data.dataset import IndexArray, RaggedColumn
from salient_ds.data.sampler import frozen_permutation
from salient_ds.data.tasks.base import Example, Features, Prediction, Task
from salient_ds.data.tasks.reading import TaskRows, read_examples

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodingReport:
    """What became of the rows."""

    rows: TaskRows
    items: int
    """Inputs of the model: examples, or windows in question answering."""
    cut: int
    """Examples that were cut to ``max_length``; in question answering, windows after the first of an example."""
    max_length: int

    def notes(self, name: str) -> list[str]:
        """What a user should know; ``name`` is the part of the data."""
        return self.rows.notes(name) + self.cut_notes(name)

    def cut_notes(self, name: str) -> list[str]:
        """What was cut, or into how many windows contexts went."""
        notes = []
        if self.items != self.rows.rows:
            notes.append(f"{name}: {self.rows.rows:,} examples in {self.items:,} windows of {self.max_length} tokens")
        elif self.cut:
            share = f"{self.cut:,} of {self.items:,} examples"
            notes.append(f"{name}: {share} are longer than data.max_length={self.max_length} tokens and were cut")
        return notes


class TaskDataset(Sequence[dict[str, Any]]):
    """Inputs of a model for the examples of a task.

    Item k is a dict of lists of int (input_ids, attention_mask, token_type_ids if the tokenizer has them), and of
    labels: int (classification), float (regression), list of int (summarisation), or start_positions and end_positions.
    Items without a label have none of these. An example has one item, or one for each window (question answering).
    """

    def __init__(
        self, task: Task, examples: Sequence[Example], features: Iterable[Features], training: bool = False
    ) -> None:
        """``training``: keep no texts and targets, which only :meth:`decode` and :meth:`score` need."""
        self.task, self.training = task, training
        ragged: dict[str, list[npt.NDArray[np.integer[Any]]]] = {}
        scalars: dict[str, list[float]] = {}
        numbers, targets, offsets, self.cut = [], [], [], 0
        for item in features:
            for name, value in item.values.items():
                if isinstance(value, list):
                    ragged.setdefault(name, []).append(np.asarray(value, np.int32))
                else:
                    scalars.setdefault(name, []).append(value)
            numbers.append(item.example)
            targets.append(item.targets)
            offsets.append(np.asarray(item.offsets, np.int32).reshape(-1))
            self.cut += item.cut
        self.example_of: IndexArray = np.array(numbers, np.int64)
        """Number of each item's example."""
        self.num_targets: IndexArray = np.array(targets, np.int64)
        """What each item counts in a mean loss: 1, or the label tokens of a summary."""
        partial = [name for name, column in (ragged | scalars).items() if len(column) != len(numbers)]
        if partial:
            raise ValueError(
                f"some rows have a label and some have none ({', '.join(partial)}): split them into two files"
            )
        self._ragged = {name: RaggedColumn(column) for name, column in sorted(ragged.items())}
        self._scalars = {
            name: np.array(column, np.float64 if any(isinstance(value, float) for value in column) else np.int64)
            for name, column in sorted(scalars.items())
        }
        self._offsets = RaggedColumn(offsets)
        # the features may come from a generator that still reads the texts, so this is last
        self.examples = [Example(example.id, ()) for example in examples] if training else list(examples)

    def __len__(self) -> int:
        return len(self.example_of)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        place = int(index) % len(self)
        item: dict[str, Any] = {name: column[place].tolist() for name, column in self._ragged.items()}
        return item | {name: column[place].item() for name, column in self._scalars.items()}

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys of every item."""
        return (*self._ragged, *self._scalars)

    @property
    def labelled(self) -> bool:
        """Whether every example has a label."""
        return "labels" in self.columns or "start_positions" in self.columns

    @property
    def largest_token(self) -> int:
        """The largest token id in inputs and target texts; 0 if there are no items."""
        columns = [self._ragged[name].values for name in ("input_ids", "labels") if name in self._ragged]
        return max((int(values.max()) for values in columns if len(values)), default=0)

    @cached_property
    def lengths(self) -> IndexArray:
        """Number of tokens of each item (of the source, for summaries)."""
        return np.diff(self._ragged["input_ids"].offsets) if len(self) else np.zeros(0, np.int64)

    def select(self, examples: Iterable[int], training: bool = False) -> TaskDataset:
        """A data set with these examples and all of their items, in this order.

        ``training``: keep no texts and targets, as for :func:`load_task`.
        """
        chosen = [int(number) for number in examples]
        items = _items_per_example(self.example_of, len(self.examples))
        features = (self._features(item, place) for place, number in enumerate(chosen) for item in items[number])
        return TaskDataset(self.task, [self.examples[number] for number in chosen], features, self.training or training)

    def split(self, size: float, seed: int) -> tuple[TaskDataset, TaskDataset]:
        """Split examples into (train, held out). The seed determines which ones are held out.

        The first part keeps no texts and targets; it is there to be trained on.

        Args:
            size: a fraction if below 1, else a whole number of examples.

        Raises:
            ValueError: a part would be empty.
        """
        total = len(self.examples)
        held_out = int(size) if size >= 1 else round(size * total)
        if not 0 < held_out < total:
            raise ValueError(
                f"data.eval_size={size:g} holds out {held_out} of {total} examples: leave one on each side"
            )
        chosen = set(frozen_permutation(total, seed)[:held_out].tolist())
        rest = [number for number in range(total) if number not in chosen]
        return self.select(rest, training=True), self.select(sorted(chosen))

    def decode(self, outputs: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> list[Prediction]:
        """One prediction per example from one element of output per item, see :meth:`Task.decode`."""
        self._refuse_training()
        for name in self.task.outputs:
            if name not in outputs or len(outputs[name]) != len(self):
                there = f"{len(outputs[name])} rows of {name!r}" if name in outputs else f"no {name!r}"
                raise ValueError(f"{there} for {len(self)} items: each item needs one")
        features = [self._features(item, int(self.example_of[item])) for item in range(len(self))]
        return self.task.decode(self.examples, features, outputs, tokenizer)

    def score(self, predictions: Sequence[Prediction]) -> dict[str, float]:
        """The task's metrics over all examples, each counted once. Raises ValueError if some have no label."""
        self._refuse_training()
        return self.task.score(predictions, self.examples)

    def _refuse_training(self) -> None:
        if self.training:
            raise ValueError("this data set was loaded for training, without texts: load it with training=False")

    def fingerprint(self) -> str:
        """sha256 of all items: equal if and only if items and their order are equal."""
        digest = hashlib.sha256()
        for name, column in self._ragged.items():
            digest.update(f"{name}:{len(self)}:{len(column.values)};".encode())
            digest.update(np.ascontiguousarray(column.offsets, "<i8").tobytes())
            digest.update(np.ascontiguousarray(column.values, "<i4").tobytes())
        for name, values in self._scalars.items():
            digest.update(f"{name}:{values.dtype.kind};".encode())
            digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())
        return digest.hexdigest()

    def _features(self, item: int, example: int) -> Features:
        offsets = [(int(start), int(end)) for start, end in self._offsets[item].reshape(-1, 2)]
        return Features(example, self[item], int(self.num_targets[item]), False, offsets)


def load_task(
    task: Task,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    training: bool,
    labelled: bool = True,
    bad_rows: OnBadRow = "error",
    limit: int | None = None,
) -> tuple[TaskDataset, EncodingReport]:
    """Read, validate and tokenise a file or data set of a task. The result is the same on every process.

    Args:
        training: the items are only trained on, and texts are not kept; otherwise :meth:`TaskDataset.decode` and
            :meth:`TaskDataset.score` can be called.
        labelled: rows without a label are errors.
        limit: read only so many rows.

    Raises:
        DataError: bad rows, or a source that cannot be read.
        ValueError: rows that cannot be encoded.
    """
    examples, rows = read_examples(task, path, labelled, bad_rows, limit)
    dataset = TaskDataset(task, examples, task.encode(examples, tokenizer, max_length, training), training)
    return dataset, EncodingReport(rows, len(dataset), dataset.cut, max_length)


def _items_per_example(example_of: IndexArray, examples: int) -> list[list[int]]:
    items: list[list[int]] = [[] for _ in range(examples)]
    for item, example in enumerate(example_of.tolist()):
        items[example].append(item)
    return items
