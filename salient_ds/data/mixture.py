"""Several data sets trained on together, each with a weight. numpy only.

Rows are numbered through all sets, in the order in which the sets are named. A weight decides how often an epoch takes
the rows of a set; no row is copied for it. Which rows an epoch takes is a pure function of the seed and the epoch.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import overload

import numpy as np
import numpy.typing as npt

from salient_ds.data.dataset import IndexArray, InstructionDataset
from salient_ds.data.shares import Share

Row = dict[str, npt.NDArray[np.int32]]


class Mixture(Sequence[Row]):
    """The rows of several data sets, one set after the other.

    Args:
        parts: at least one set. All have the same columns, which are those of :class:`InstructionDataset`. Sets
            without rows are allowed if another one has some.
        shares: what an epoch takes of each set; None if it takes every row once.
    """

    def __init__(self, parts: Sequence[InstructionDataset], shares: Sequence[Share] | None = None) -> None:
        self.parts = tuple(parts)
        self.shares = tuple(shares) if shares is not None else tuple(Share(len(part), len(part)) for part in parts)
        assert [len(part) for part in self.parts] == [share.rows for share in self.shares], "one share per set"
        self._ends = list(accumulate(len(part) for part in self.parts))
        assert self._ends and self._ends[-1], "a mixture needs rows"
        columns = {part.columns for part in self.parts if len(part)}
        assert len(columns) == 1, f"the sets have different columns: {columns}"

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        position = index % len(self)
        part = bisect_right(self._ends, position)
        return self.parts[part][position - (self._ends[part - 1] if part else 0)]

    @cached_property
    def num_targets(self) -> IndexArray:
        """Per row, the number of labels trained on after the causal shift: int64 (rows of all sets,)."""
        return np.concatenate([part.num_targets for part in self.parts if len(part)])

    def fingerprint(self) -> str:
        """sha256 over all sets and their shares: equal if and only if the same rows are trained on as often."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(b"mixture;")
        for part, share in zip(self.parts, self.shares, strict=True):
            digest.update(f"{part.fingerprint()}:{share.rows}:{share.per_epoch};".encode())
        return digest.hexdigest()
