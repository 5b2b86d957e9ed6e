"""Packs several examples into one sequence, in which none attends to another. numpy only; the collator makes the mask.

A packed example has "segment_ids" (0, 0, ..., 1, 1, ...: the example that a token belongs to) and "position_ids" (from
0 in each segment). The first label of a segment is -100, because it would be predicted from the last token of the
segment before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from salient_ds.data.conversation import IGNORED


def plan_packs(lengths: Sequence[int] | npt.NDArray[np.int64], max_length: int) -> list[list[int]]:
    """Choose which examples share a sequence: one list of ascending indices per sequence, every index exactly once.

    Examples are placed from the longest to the shortest, each into the first sequence with enough room (first-fit
    decreasing). Examples of equal length keep their order.

    Raises:
        ValueError: an example is longer than ``max_length``.
    """
    sizes = [int(length) for length in lengths]
    if sizes and max(sizes) > max_length:
        worst = max(sizes)
        raise ValueError(
            f"example {sizes.index(worst)} has {worst} tokens, a packed sequence holds {max_length}: cut "
            "examples to the same max_length first"
        )
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    packs: list[list[int]] = []
    room = _FirstRoom(len(sizes), max_length)
    for index in order:
        pack = room.take(sizes[index])
        if pack == len(packs):
            packs.append([])
        packs[pack].append(index)
    return [sorted(pack) for pack in packs]


def pack_examples(
    examples: Sequence[Mapping[str, npt.NDArray[Any]]],
    lengths: Sequence[int] | npt.NDArray[np.int64],
    max_length: int,
) -> Iterator[dict[str, npt.NDArray[np.int32]]]:
    """Yields packed examples. Every column of an example must have one entry per token. Raises as `plan_packs`."""
    for pack in plan_packs(lengths, max_length):
        yield _join([examples[index] for index in pack])


def _join(parts: list[Mapping[str, npt.NDArray[Any]]]) -> dict[str, npt.NDArray[np.int32]]:
    sizes = [len(part["labels"]) for part in parts]
    joined = {name: np.concatenate([part[name] for part in parts]).astype(np.int32) for name in parts[0]}
    assert all(len(column) == sum(sizes) for column in joined.values()), (
        "packing needs one entry per token in every column"
    )
    joined["labels"][np.cumsum([0, *sizes[:-1]])] = IGNORED
    joined["segment_ids"] = np.repeat(np.arange(len(parts), dtype=np.int32), sizes)
    joined["position_ids"] = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
    return joined


class _FirstRoom:
    """Finds the first of `count` bins with enough room, in log time. A tree node holds the largest room below it."""

    def __init__(self, count: int, capacity: int) -> None:
        self.leaves = 1 << max(0, count - 1).bit_length()
        self.room = [capacity] * (2 * self.leaves)

    def take(self, size: int) -> int:
        """Puts `size` into the first bin that can hold it and returns the bin's number."""
        room = self.room
        node = 1
        while node < self.leaves:
            node = 2 * node if room[2 * node] >= size else 2 * node + 1
        room[node] -= size
        bin_number = node - self.leaves
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
        return bin_number
