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
from salient_ds.data.token_report import TokenizationReport
from salient_ds.data.tokenize import count_targets, tokenize_all

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IntArray = npt.NDArray[np.integer[Any]]
IndexArray = npt.NDArray[np.int64]
_PIECE = 2**22
"""Tokens that are hashed at once."""


class RaggedColumn:
    """Rows of varying length in one flat array: row k is values[offsets[k]:offsets[k + 1]]."""

    def __init__(self, rows: Sequence[IntArray]) -> None:
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        self.offsets: IndexArray = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        self.values = np.concatenate(rows).astype(np.int32, casting="same_kind") if rows else np.zeros(0, np.int32)

    @classmethod
    def of(cls, offsets: IndexArray, values: npt.NDArray[np.int32]) -> RaggedColumn:
        """The column of arrays that exist already, such as mapped files."""
        column = cls.__new__(cls)
        column.offsets, column.values = offsets, values
        return column

    def __getitem__(self, index: int) -> npt.NDArray[np.int32]:
        return self.values[self.offsets[index] : self.offsets[index + 1]]


class InstructionDataset(Sequence[dict[str, npt.NDArray[np.int32]]]):
    """A list of examples, each a dict of int32 arrays. All examples have the same keys, which include "labels".

    It takes 4 bytes per token and column, and has no Python object per example. The arrays that it returns are views:
    do not write to them. A selection shares the arrays of the data set that it is of.
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
        self.ragged = {name: RaggedColumn(column) for name, column in rows.items()}
        self._chosen: IndexArray = np.arange(count)

    @classmethod
    def of(cls, columns: Mapping[str, RaggedColumn], chosen: IndexArray) -> InstructionDataset:
        """The rows ``chosen`` (int64) of columns, in this order. Columns are in the order of their names."""
        dataset = cls(())
        dataset.ragged, dataset._chosen = dict(columns) if len(chosen) else {}, chosen
        return dataset

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> dict[str, npt.NDArray[np.int32]]: ...
    @overload
    def __getitem__(self, index: slice) -> InstructionDataset: ...
    def __getitem__(self, index: int | slice) -> dict[str, npt.NDArray[np.int32]] | InstructionDataset:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        row = int(self._chosen[index])
        return {name: column[row] for name, column in self.ragged.items()}

    def __iter__(self) -> Iterator[dict[str, npt.NDArray[np.int32]]]:
        return (self[index] for index in range(len(self)))

    @property
    def columns(self) -> tuple[str, ...]:
        """Keys of every example."""
        return tuple(self.ragged)

    @cached_property
    def num_targets(self) -> IndexArray:
        """Per example, the number of labels trained on after the causal shift. The loss is normalised by it."""
        return np.fromiter((count_targets(example["labels"]) for example in self), np.int64, len(self))

    @cached_property
    def lengths(self) -> IndexArray:
        """Number of tokens of each example, counted by its labels."""
        return self._lengths(self.ragged["labels"]) if len(self) else np.zeros(0, np.int64)

    def select(self, indices: Iterable[int] | IndexArray) -> InstructionDataset:
        """A data set with these examples, in this order. Raises IndexError for an example that is not there."""
        wanted = indices if isinstance(indices, np.ndarray) else np.fromiter(indices, np.int64)
        selection = InstructionDataset.of(self.ragged, self._chosen[wanted])
        if "num_targets" in self.__dict__:  # known already, as in the cache
            selection.num_targets = self.num_targets[wanted]
        return selection

    def fingerprint(self) -> str:
        """sha256 over keys, lengths and values: equal if and only if the examples and their order are equal."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        starts = np.flatnonzero(np.diff(self._chosen, prepend=-2) != 1)
        ends = np.append(starts[1:], len(self))
        for name, column in self.ragged.items():
            offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._lengths(column))])
            digest.update(f"{name}:{len(self)}:{offsets[-1]};".encode())
            digest.update(np.ascontiguousarray(offsets, "<i8").tobytes())
            for start, end in zip(starts, ends, strict=True):  # rows that follow each other are one piece of the file
                first, last = column.offsets[self._chosen[start]], column.offsets[self._chosen[end - 1] + 1]
                for at in range(first, last, _PIECE):
                    digest.update(np.ascontiguousarray(column.values[at : min(at + _PIECE, last)], "<i4").data)
        return digest.hexdigest()

    def _lengths(self, column: RaggedColumn) -> IndexArray:
        lengths: IndexArray = column.offsets[self._chosen + 1] - column.offsets[self._chosen]
        return lengths


def build_dataset(
    rows: Iterable[Conversation],
    template: Template,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    packing: bool = False,
    progress: bool = False,
    bad_rows: OnBadRow = "error",
    workers: int = 1,
) -> tuple[InstructionDataset, TokenizationReport]:
    """Tokenises conversations, and packs them if `packing` is on (:func:`salient_ds.data.packing.plan_packs`).

    `max_length` is in tokens and limits both examples and packed sequences. `progress`: a bar on a terminal. `workers`:
    processes that tokenise. Raises
    ValueError when there are no rows, or when truncation leaves no answer in any of them.
    """
    report = TokenizationReport(max_length)
    if progress:
        from tqdm import tqdm

        rows = tqdm(rows, desc="tokenize", unit=" examples", leave=False, disable=None)
    dataset = InstructionDataset(tokenize_all(rows, template, tokenizer, max_length, report, bad_rows, workers=workers))
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
