"""How many optimizer steps a run has. Training and the checks before it both count here. No torch."""

from __future__ import annotations

import math

MOST_STEPS = 10_000_000
"""The longest run: three weeks at 0.18 s per step. A slip of the keyboard must not fill memory with a schedule."""


def steps_per_epoch(rows: int, global_batch_size: int) -> int:
    """Global batches that cover all ``rows`` data rows once. The last one is filled up from the next epoch's order."""
    return math.ceil(rows / global_batch_size)


def total_steps(rows: int, global_batch_size: int, epochs: float) -> int:
    """Optimizer steps for ``epochs`` passes over ``rows`` data rows, rounded up; at least 1.

    Example: 4.4 epochs of 25 rows are 110 rows, so batches of 2 take 55 steps. The number of rows is first rounded to
    six places: 4.4 * 25 is 110.00000000000001 in floating point, which must not add a 56th step.

    Raises:
        ValueError: ``epochs`` is not above 0, or the run would have more than :data:`MOST_STEPS` steps.
    """
    if not epochs > 0:
        raise ValueError(f"epochs={epochs}: must be above 0")
    if not epochs * rows / global_batch_size <= MOST_STEPS:
        raise ValueError(
            f"train.epochs={epochs:g} of {rows} rows are more than {MOST_STEPS:,} steps of {global_batch_size} rows: "
            "lower it"
        )
    return max(1, math.ceil(round(epochs * rows, 6) / global_batch_size))


def steps_or_fraction(value: float, total_steps: int) -> int:
    """Convert ``value`` to steps: below 1 it is a fraction of ``total_steps`` (rounded), else a whole number of steps.

    Raises:
        ValueError: ``value`` is negative, not finite, or above 1 and not whole.
    """
    if not math.isfinite(value):
        raise ValueError(f"{value} is no number of steps: give a number of steps, or a fraction below 1")
    if value < 0:
        raise ValueError(f"{value:g} steps is negative: give a number of steps, or a fraction below 1")
    if value < 1:
        return round(value * total_steps)
    if value != int(value):
        raise ValueError(
            f"{value:g} is neither a whole number of steps nor a fraction below 1: "
            f"write {round(value)} steps, or {value / total_steps:.3g} for that share of {total_steps} steps"
        )
    return int(value)
