"""Measures of how well recovered ranks match planted ones, and means over seeds with intervals. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

CONFIDENCE = 0.95
FEWEST = 3
"""Fewest values for an interval. With only two, equal values would look like certainty."""


@dataclass(frozen=True)
class RankScores:
    """Ranks of one student compared with those of its teacher."""

    overlap: int
    """Sum over matrices of min(recovered, planted) ranks."""
    precision: float | None
    """Overlap divided by the student's total rank; None if the student kept nothing."""
    recall: float
    """Overlap divided by the planted total."""
    spearman: float | None
    """Spearman's correlation over matrices; None if all ranks of the student, or all of the teacher, are equal."""
    mean_difference: float
    """Mean over matrices of |recovered - planted|."""


def rank_scores(recovered: Sequence[int], planted: Sequence[int]) -> RankScores:
    """Compare the ranks of all matrices, given in the same order.

    Precision and recall are equal if the student's total rank is exactly the planted total.
    """
    from scipy.stats import spearmanr

    assert len(recovered) == len(planted) > 0 and sum(planted) > 0
    overlap = sum(map(min, recovered, planted))
    constant = len(set(recovered)) == 1 or len(set(planted)) == 1
    return RankScores(
        overlap=overlap,
        precision=overlap / sum(recovered) if sum(recovered) else None,
        recall=overlap / sum(planted),
        spearman=None if constant else float(spearmanr(recovered, planted).statistic),
        mean_difference=sum(abs(a - b) for a, b in zip(recovered, planted, strict=True)) / len(planted),
    )


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval. Both ends are None if there are too few values for an interval."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def side_of(self, value: float) -> int:
        """Return 1 if the whole interval is above ``value``, -1 if it is below, 0 otherwise or without an interval."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > value) - (self.high < value)


def estimate(
    values: Sequence[float | None], bounds: tuple[float, float] = (float("-inf"), float("inf"))
) -> Estimate | None:
    """Mean of the values that are defined and finite, with Student's 95% t interval, clipped to ``bounds``.

    If all values are equal, the interval is that single value. With fewer than :data:`FEWEST` values there is no
    interval. With none, the result is None.
    """
    from scipy.stats import t

    known = [value for value in values if value is not None and isfinite(value)]
    if not known:
        return None
    count, mean = len(known), sum(known) / len(known)
    if count < FEWEST:
        return Estimate(mean, None, None, count)
    variance = sum((value - mean) ** 2 for value in known) / (count - 1)
    half = float(t.ppf(0.5 + CONFIDENCE / 2, count - 1)) * (variance / count) ** 0.5
    return Estimate(mean, max(mean - half, bounds[0]), min(mean + half, bounds[1]), count)


def paired(values: Sequence[float | None], others: Sequence[float | None]) -> Estimate | None:
    """Estimate the mean of value minus other over the seeds where both are defined."""
    pairs = zip(values, others, strict=True)
    return estimate([a - b if a is not None and b is not None else None for a, b in pairs])


def random_recall(planted: Sequence[int], initial_rank: int, budget: int) -> float:
    """Expected recall if ``budget`` singular values are kept at random, out of ``initial_rank`` per matrix.

    The number kept in one matrix has a hypergeometric distribution.
    """
    from scipy.stats import hypergeom

    kept = hypergeom(initial_rank * len(planted), initial_rank, budget)
    chances = [float(kept.pmf(k)) for k in range(initial_rank + 1)]
    expected = sum(chance * min(k, rank) for rank in planted for k, chance in enumerate(chances))
    return expected / sum(planted)
