"""How well recovered ranks match planted ones, and means over seeds with their intervals. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

CONFIDENCE = 0.95
FEWEST = 3
"""Values that an interval needs: below, two equal ones would look like certainty."""


@dataclass(frozen=True)
class RankScores:
    """One student against one teacher."""

    overlap: int
    """Sum over matrices of min(recovered, planted) ranks."""
    precision: float | None
    """Overlap relative to the student's total rank; None if it kept nothing."""
    recall: float
    """Overlap relative to the planted total."""
    spearman: float | None
    """Rank correlation over matrices; None if all of the student's (or the teacher's) ranks are equal."""
    mean_difference: float
    """Mean over matrices of |recovered - planted|."""


def rank_scores(recovered: Sequence[int], planted: Sequence[int]) -> RankScores:
    """Compare ranks per matrix, in the same order.

    With the planted total as budget, met exactly, precision and recall are equal.
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
    """A mean with its interval; both ends are None if there are too few values for one."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def side_of(self, value: float) -> int:
        """1 or -1 if the whole interval lies above or below ``value``, 0 if it does not tell."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > value) - (self.high < value)


def estimate(
    values: Sequence[float | None], bounds: tuple[float, float] = (float("-inf"), float("inf"))
) -> Estimate | None:
    """Mean of the defined values and Student's t interval at 95%, cut at ``bounds``; None if no value is defined.

    If all values are equal, the interval is that value; below :data:`FEWEST` values there is none.
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
    """Estimate of value minus other, seed by seed, where both are defined."""
    pairs = zip(values, others, strict=True)
    return estimate([a - b if a is not None and b is not None else None for a, b in pairs])


def random_recall(planted: Sequence[int], initial_rank: int, budget: int) -> float:
    """Expected recall if ``budget`` of the ``initial_rank`` values per matrix are kept by lot.

    The number kept in one matrix is hypergeometric.
    """
    from scipy.stats import hypergeom

    kept = hypergeom(initial_rank * len(planted), initial_rank, budget)
    chances = [float(kept.pmf(k)) for k in range(initial_rank + 1)]
    expected = sum(chance * min(k, rank) for rank in planted for k, chance in enumerate(chances))
    return expected / sum(planted)
