"""Chooses the examples of each step: a pure function of (seed, step), the same for any number of processes.

Each epoch is a seeded permutation of the data set. The epochs form one stream, and step t takes the t-th block of
`global_batch_size` examples from it; a block may cross the end of an epoch. Nothing is stored, so a run can resume at
any step.

Several data sets with weights: an epoch takes some rows more than once, and leaves others out. Of a set with a weight
of 2.3, it takes every row twice and 0.3 of them once more. Those are the next ones of a stream of permutations of the
set, so that over the epochs all rows get their turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from salient_ds import steps
from salient_ds.data.shares import Share

_OF_A_SET = 1
"""Sets the stream of a data set apart from the order of an epoch, which has only two numbers as seed."""
Indices = npt.NDArray[np.int64]


def frozen_permutation(count: int, *seed: int) -> Indices:
    """A permutation of range(count) that is the same in every numpy version: int64 (count,).

    A resumed run may use a newer numpy. numpy guarantees the streams of RandomState, but not those of default_rng.
    """
    bits = np.random.MT19937(np.random.SeedSequence(seed))
    return np.random.RandomState(bits).permutation(count).astype(np.int64)


def epoch_rows(shares: Sequence[Share], seed: int, epoch: int) -> Indices:
    """Rows that an epoch takes of several sets, set by set: int64 (sum of all ``per_epoch``,).

    Rows are numbered through all sets.
    """
    taken, first = [], 0
    for number, share in enumerate(shares):
        whole, rest = divmod(share.per_epoch, share.rows)
        own = [np.arange(share.rows, dtype=np.int64)] * whole
        position = epoch * rest
        while rest:
            round_, start = divmod(position, share.rows)
            part = frozen_permutation(share.rows, seed, round_, number, _OF_A_SET)[start : start + rest]
            own.append(part)
            position, rest = position + len(part), rest - len(part)
        taken += [first + part for part in own]
        first += share.rows
    return np.concatenate(taken)


class StepSampler:
    """Examples of each step; steps count from 0 here.

    Args:
        num_examples: examples of an epoch.
        shares: what an epoch takes of each of several data sets; ``num_examples`` altogether. Empty: every example of
            one data set once.

    Raises ValueError when there are no examples, for a batch size below 1, and for a negative seed.
    """

    def __init__(self, num_examples: int, global_batch_size: int, seed: int, shares: Sequence[Share] = ()) -> None:
        for name, value, least in (
            ("num_examples", num_examples, 1),
            ("global_batch_size", global_batch_size, 1),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value}: must be at least {least}")
        self.num_examples = num_examples
        self.global_batch_size = global_batch_size
        self.seed = seed
        assert not shares or sum(share.per_epoch for share in shares) == num_examples, "shares make up an epoch"
        self.shares = tuple(shares)
        self._last: tuple[int, Indices] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Steps of an epoch. The last of them may contain examples of the next epoch."""
        return steps.steps_per_epoch(self.num_examples, self.global_batch_size)

    def total_steps(self, epochs: float) -> int:
        """Steps until `epochs` passes are complete; see :func:`salient_ds.steps.total_steps`."""
        return steps.total_steps(self.num_examples, self.global_batch_size, epochs)

    def epoch(self, step: int) -> float:
        """Epochs completed before `step`, as a float."""
        return step * self.global_batch_size / self.num_examples

    def indices(self, step: int) -> Indices:
        """The examples of the global batch at `step`, in order: int64 (global_batch_size,)."""
        if step < 0:
            raise ValueError(f"step={step}: steps count from 0")
        position = step * self.global_batch_size
        parts: list[Indices] = []
        missing = self.global_batch_size
        while missing:
            epoch, start = divmod(position, self.num_examples)
            part = self._permutation(epoch)[start : start + missing]
            parts.append(part)
            position += len(part)
            missing -= len(part)
        return np.concatenate(parts)

    def shard(self, step: int, global_rank: int, world_size: int, micro_batch_size: int) -> list[Indices]:
        """The micro-batches that process `global_rank` of `world_size` takes at `step`, each (micro_batch_size,).

        The global batch is cut into micro-batches, which are given to the processes in turn. So for one
        micro_batch_size, not only the batch but every micro-batch is the same for any number of processes. Raises
        ValueError with the nearest valid batch sizes if the global batch cannot be divided evenly.
        """
        if micro_batch_size < 1 or world_size < 1 or not 0 <= global_rank < world_size:
            raise ValueError(
                f"micro_batch_size={micro_batch_size} and world_size={world_size} must be at least 1, and "
                f"global_rank={global_rank} from 0 to world_size - 1"
            )
        together = micro_batch_size * world_size
        if self.global_batch_size % together:
            below = self.global_batch_size // together * together
            valid = " or ".join(str(size) for size in (below, below + together) if size)
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not divisible by micro_batch_size="
                f"{micro_batch_size} x {world_size} processes = {together}: set it to {valid}, or change the "
                "micro-batch"
            )
        return list(self.indices(step).reshape(-1, world_size, micro_batch_size)[:, global_rank])

    def _permutation(self, epoch: int) -> Indices:
        if self._last is None or self._last[0] != epoch:
            order = frozen_permutation(self.num_examples, self.seed, epoch)
            self._last = (epoch, epoch_rows(self.shares, self.seed, epoch)[order] if self.shares else order)
        return self._last[1]
