"""How many rows of each of several data sets an epoch takes, and how many are held out. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Share(NamedTuple):
    """One data set's part of an epoch."""

    rows: int
    """Rows of the set that are trained on."""
    per_epoch: int
    """Rows that an epoch takes of it: ``rows`` for a weight of 1, more or fewer for others."""


def share_of(rows: int, weight: float) -> Share:
    """The part of an epoch that a set of ``rows`` rows has: ``weight`` times its rows, rounded, and at least one.

    Example: 100 rows with a weight of 2.5 are 250 rows of every epoch.
    """
    return Share(rows, max(1, math.floor(round(rows * weight, 6) + 0.5)))


def held_out_counts(sizes: Sequence[int], size: float) -> list[int]:
    """Rows that are held out of each of several data sets.

    Args:
        sizes: rows of each set, at least one each.
        size: a fraction below 1, taken of every set; or a whole number of rows altogether, divided in proportion to
            the sizes.

    Raises:
        ValueError: nothing would be held out, or nothing be left of a set to train on.
    """
    total = sum(sizes)
    if size >= 1 and size != int(size):
        raise ValueError(f"data.eval_size={size:g}: give a whole number of rows, or a fraction below 1")
    most = total - len(sizes)
    if size >= 1:
        if size > most:
            raise ValueError(
                f"data.eval_size={size:g} holds out more than the {most} rows that {len(sizes)} sets of together "
                f"{total} rows can spare, if one row of each is to be trained on: lower it"
            )
        return _apportioned(sizes, int(size))
    counts = [min(round(size * rows), rows - 1) for rows in sizes]
    if not any(counts):
        raise ValueError(
            f"data.eval_size={size:g} holds out no row of any of {len(sizes)} sets, the largest of which has "
            f"{max(sizes)} rows: raise it, or give a number of rows"
        )
    return counts


def _apportioned(sizes: Sequence[int], wanted: int) -> list[int]:
    """``wanted`` rows divided in proportion to the sizes: whole parts first, then the largest remainders."""
    total = sum(sizes)
    counts = [min(wanted * rows // total, rows - 1) for rows in sizes]
    order = sorted(range(len(sizes)), key=lambda k: (-(wanted * sizes[k] % total), k))
    while (missing := wanted - sum(counts)) > 0:
        for k in [k for k in order if counts[k] < sizes[k] - 1][:missing]:
            counts[k] += 1
    return counts
