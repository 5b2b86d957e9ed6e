"""Statistics of a sweep: spread over seeds, and differences from the baseline seed by seed. No torch.

Both runs of a pair have the same seed, hence the same order of the data and the same held-out rows. What a seed does to
both cancels in their difference. The interval is Student's t, for n differences that are roughly normal. With several
arms, one in twenty intervals misses by chance; Holm's adjusted p-values (Holm 1979) account for that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import mean, median, stdev
from typing import Any

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """Values of one arm over its fresh seeds."""

    n: int
    mean: float
    median: float
    low: float
    """The smallest value."""
    high: float
    """The largest value."""
    deviation: float | None
    """Standard deviation (n - 1); None for one value."""


def spread(values: Sequence[float]) -> Spread | None:
    """The spread of finite values; None if there are none."""
    if not values:
        return None
    deviation = stdev(values) if len(values) > 1 else None
    return Spread(len(values), mean(values), median(values), min(values), max(values), deviation)


@dataclass(frozen=True)
class Difference:
    """An arm minus the baseline, over the seeds that both have finished."""

    arm: str
    baseline: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    low: float | None = None
    """Lower end of the 95 % interval of the mean; None for fewer than two seeds."""
    high: float | None = None
    p: float | None = None
    """Two-sided p-value of the paired t-test."""
    p_holm: float | None = None
    """``p`` adjusted for the number of arms."""
    verdict: str = "not told apart"
    """better, worse, or not told apart (the interval contains 0, or there is none)."""

    @property
    def n(self) -> int:
        return len(self.values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"seeds": list(self.seeds), "values": list(self.values), "n": self.n}


def paired(
    arm: str, baseline: str, values: Mapping[int, float], others: Mapping[int, float], sign: int = 1
) -> Difference | None:
    """The difference of an arm from the baseline; None if no seed has both.

    Args:
        values: seed -> value of the arm.
        others: seed -> value of the baseline.
        sign: 1 if lower values are better, -1 if higher ones are.
    """
    seeds = tuple(sorted(set(values) & set(others)))
    if not seeds:
        return None
    found = tuple(values[seed] - others[seed] for seed in seeds)
    result = Difference(arm, baseline, seeds, found, mean(found))
    if len(found) < 2:
        return result
    low, high = t_interval(found)
    verdict = "not told apart"
    if low > 0 or high < 0:
        verdict = "better" if sign * result.mean < 0 else "worse"
    return replace(result, low=low, high=high, p=t_test(found), verdict=verdict)


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Student's t interval of the mean of at least two values. It has no width if they are all equal."""
    from scipy import stats

    centre, error = mean(values), stdev(values) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return centre - half, centre + half


def t_test(values: Sequence[float]) -> float:
    """Two-sided p-value for a mean of 0. Equal values: 1 if they are 0, else 0."""
    from scipy import stats

    if stdev(values) == 0:
        return 1.0 if values[0] == 0 else 0.0
    return float(stats.ttest_1samp(values, 0.0).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the given order."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, running = [1.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = running
    return adjusted


def with_holm(differences: Sequence[Difference]) -> list[Difference]:
    """The differences with ``p_holm``, adjusted over those that have a p-value."""
    known = [item for item in differences if item.p is not None]
    adjusted = dict(zip((item.arm for item in known), holm([item.p or 0.0 for item in known]), strict=True))
    return [replace(item, p_holm=adjusted.get(item.arm)) for item in differences]
