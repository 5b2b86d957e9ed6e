"""Tokenised examples in a few flat arrays, and how to build, split and fingerprint them. numpy only."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from salient_ds.data.conversation import Conversation, OnBadRow
from salient_ds.data.packing import pack_examples
from salient_ds.data.sampler import frozen_permutation
from salient_ds.data.template_base import Template
from salient_ds.data.tokenize import TokenizationReport, count_targets, tokenize_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray = npt.NDArray[np.integer[Any]]
IndexArray = npt.NDArray[np.int64]


class RaggedColumn:
    """Rows of varying length in one flat array: row k is values[offsets[k]:offsets[k + 1]]."""

    def __init__(self, rows: Sequence[IntArray]) -> None:
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        self.offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self.values = np.concatenate(rows).astype(np.int32, casting="same_kind") if rows else np.zeros(0, np.int32)

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


class InstructionDataset(Sequence[dict[str, npt.NDArray[np.int32]]]):
    """A list of examples, each a dict of int32 arrays. All examples have the same keys, which include "labels".

    It takes 4 bytes per token and column, and has no Python object per example. The arrays that it returns are views:
    do not write to them.
    """

    def __init__(self, examples: Iterable[Mapping[str, Any]]) -> None:
        rows: dict[str, list[IntArray]] = {}
        count = 0
        for count, example in enumerate(examples, start=1):
            if count == 1:
                rows = {name: [] for name in sorted(example)}
                assert "labels" in rows, "an example needs labels"
            assert sorted(example) == list(rows), f"example {count} has the keys {sorted(example)}, not {list(rows)}"
            for name, values in example.items():
                rows[name].append(np.asarray(values))
        self._columns = {name: RaggedColumn(column) for name, column in rows.items()}
        self._length = count

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> dict[str, npt.NDArray[np.int32]]: ...
    @overload
    def __getitem__(self, index: slice) -> InstructionDataset: ...
    def __getitem__(self, index: int | slice) -> dict[str, npt.NDArray[np.int32]] | InstructionDataset:
        if isinstance(index, slice):
            return self.select(np.arange(self._length)[index])
        if not -self._length <= index < self._length:
            raise IndexError(f"example {index} of {self._length}")
        return {name: column[int(index) % self._length] for name, column in self._columns.items()}

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[np.int32]]]:
        return (self[index] for index in range(self._length))

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys of every example."""
        return tuple(self._columns)

    @cached_property
    def num_targets(self) -> IndexArray:
        """Per example, the number of labels trained on after the causal shift. The loss is normalised by it."""
        return np.fromiter((count_targets(example["labels"]) for example in self), np.int64, self._length)

    @cached_property
    def lengths(self) -> IndexArray:
        """Number of tokens of each example, counted by its labels."""
        return np.diff(self._columns["labels"].offsets) if self._length else np.zeros(0, np.int64)

    def select(self, indices: Iterable[int] | IndexArray) -> InstructionDataset:
        """A data set with these examples, in this order."""
        return InstructionDataset(self[int(index)] for index in indices)

    def fingerprint(self) -> str:
        """sha256 over keys, lengths and values: equal if and only if the examples and their order are equal."""
        digest = hashlib.sha256()
        for name, column in self._columns.items():
            digest.update(f"{name}:{self._length}:{len(column.values)};".encode())
            digest.update(np.ascontiguousarray(column.offsets, "<i8").tobytes())
            digest.update(np.ascontiguousarray(column.values, "<i4").tobytes())
        return digest.hexdigest()


def build_dataset(
    rows: Iterable[Conversation],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    packing: bool = False,
    progress: bool = False,
    bad_rows: OnBadRow = "error",
) -> tuple[InstructionDataset, TokenizationReport]:
    """Tokenises conversations, and packs them if `packing` is on (:func:`salient_ds.data.packing.plan_packs`).

    `max_length` is in tokens and limits both examples and packed sequences. `progress` shows a bar. Raises ValueError
    when there are no rows, or when truncation leaves no answer in any of them.
    """
    report = TokenizationReport(max_length)
    if progress:
        from tqdm import tqdm

        rows = tqdm(rows, desc="tokenize", unit=" examples", leave=False)
    dataset = InstructionDataset(tokenize_all(rows, template, tokenizer, max_length, report, bad_rows))
    if not len(dataset):
        raise ValueError("there are no conversations to tokenise")
    if packing:
        dataset = InstructionDataset(pack_examples(dataset, dataset.lengths, max_length))
    report.sequences = len(dataset)
    return dataset, report


def split_eval(dataset: InstructionDataset, size: float, seed: int) -> tuple[InstructionDataset, InstructionDataset]:
    """Split into (train, eval). The seed determines which examples are held out. Both parts keep the data set's order.

    `size`: a fraction if below 1, else a whole number of examples. With packing, examples are packed sequences. Raises
    ValueError unless both parts get at least one example.
    """
    total = len(dataset)
    if size >= 1 and size != int(size):
        raise ValueError(f"eval size {size}: give a whole number of examples, or a fraction below 1")
    held_out = int(size) if size >= 1 else round(size * total)
    if not 0 < held_out < total:
        raise ValueError(
            f"eval size {size} holds out {held_out} of {total} examples: it must leave at least one on "
            f"either side, so give 1 to {total - 1} examples, or a fraction between {1 / total:.2g} and "
            f"{1 - 1 / total:.2g}"
        )
    chosen = frozen_permutation(total, seed)[:held_out]
    in_eval = np.zeros(total, bool)
    in_eval[chosen] = True
    return dataset.select(np.flatnonzero(~in_eval)), dataset.select(np.flatnonzero(in_eval))
