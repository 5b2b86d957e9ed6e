"""Statistics of single grading: means, missing scores, intervals, paired differences.

Shapes: scores_QT holds one score for each question (Q) and turn (T = 2), NaN where there is none.
Questions are the unit of resampling, because the two turns of a question are one conversation and not independent
(Zheng et al. 2023 judge 80 questions; Miller 2024, arXiv 2411.00640, treats clustered errors in such evaluations).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from salient_ds.sweep.statistics import holm

from .store import Row

Array = npt.NDArray[np.float64]
LOWEST_SCORE = 1.0


@dataclass(frozen=True)
class ScoreTable:
    """All scores of one model by one judge. Graded repeats of a call are averaged."""

    model: str
    question_ids: tuple[int, ...]
    categories: tuple[str, ...]
    scores_QT: Array
    counts: Mapping[str, int]
    repeat_spread: float | None

    @property
    def failure_rate(self) -> float:
        total = sum(self.counts.values())
        return 1.0 - self.counts.get("graded", 0) / total if total else 1.0

    def select(self, category: str | None = None, turn: int | None = None) -> Array:
        """Return the graded scores of a category and turn as a flat array. None means all."""
        rows = np.array([category in (None, name) for name in self.categories], dtype=bool)
        part: Array = self.scores_QT[rows] if turn is None else self.scores_QT[rows][:, [turn - 1]]
        return np.asarray(part[~np.isnan(part)])


def score_tables(rows: Iterable[Row], categories: Mapping[int, str] | None = None) -> dict[str, ScoreTable]:
    """Build one table per model from the rows of a ``_single.jsonl`` file. FastChat's own files work, too.

    ``categories`` gives the category by question id. For other questions the category is read from the rows.
    """
    scores: dict[str, dict[tuple[int, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    names: dict[int, str] = dict(categories or {})
    for row in rows:
        model, cell = row["model"], (row["question_id"], row["turn"])
        status = row.get("status") or ("graded" if row["score"] != -1 else "unparsed")
        counts[model][status] += 1
        names.setdefault(row["question_id"], row.get("category", "unknown"))
        scores[model][cell] += [float(row["score"])] if status == "graded" else []
    return {m: _table(m, cells, counts[m], names) for m, cells in sorted(scores.items())}


def _table(
    model: str, cells: Mapping[tuple[int, int], list[float]], counts: Counter[str], names: Mapping[int, str]
) -> ScoreTable:
    ids = sorted({question for question, _ in cells})
    scores_QT = np.full((len(ids), 2), np.nan)
    for (question, turn), values in cells.items():
        if values:
            scores_QT[ids.index(question), turn - 1] = np.mean(values)
    spreads = [np.std(values, ddof=1) for values in cells.values() if len(values) > 1]
    spread = float(np.sqrt(np.mean(np.square(spreads)))) if spreads else None
    return ScoreTable(model, tuple(ids), tuple(names[i] for i in ids), scores_QT, dict(counts), spread)


def mean_or_none(values: Array) -> float | None:
    return float(np.mean(values)) if values.size else None


def pooled_mean(scores_QT: Array) -> float | None:
    """Mean over all graded answers of both turns. This is FastChat's "Average"."""
    return mean_or_none(scores_QT[~np.isnan(scores_QT)])


def mean_of_turns(scores_QT: Array) -> float | None:
    """Mean of the means of the two turns. It equals the pooled mean if no score is missing."""
    turns = [mean_or_none(column[~np.isnan(column)]) for column in scores_QT.T]
    return None if None in turns else float(np.mean([t for t in turns if t is not None]))


def pooled_with_failures_as_lowest(scores_QT: Array) -> float:
    """Pooled mean with every missing score set to the lowest, 1. This bounds the gain from leaving them out."""
    return float(np.mean(np.nan_to_num(scores_QT, nan=LOWEST_SCORE)))


def bootstrap_interval(
    scores_QT: Array, categories: Sequence[str], draws: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval of the pooled mean. Whole questions are resampled within their category.

    None if fewer than two questions have a score.
    """
    sums_Q = np.nansum(scores_QT, axis=1)
    counts_Q = np.sum(~np.isnan(scores_QT), axis=1)
    if np.count_nonzero(counts_Q) < 2:
        return None
    draws_BQ = resample(categories, draws, seed)
    totals_B = counts_Q[draws_BQ].sum(axis=1)
    means_B = sums_Q[draws_BQ].sum(axis=1)[totals_B > 0] / totals_B[totals_B > 0]
    low, high = np.quantile(means_B, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resample(strata: Sequence[str], draws: int, seed: int) -> npt.NDArray[np.int64]:
    """Draw indices (draws, Q) with replacement within each stratum."""
    generator = np.random.default_rng(seed)
    names = np.array(strata)
    draws_BQ = np.empty((draws, len(names)), dtype=np.int64)
    for name in sorted(set(strata)):
        (places,) = np.nonzero(names == name)
        draws_BQ[:, places] = generator.choice(places, size=(draws, places.size))
    return draws_BQ


def clustered_standard_error(scores_QT: Array) -> float | None:
    """Standard error of the pooled mean, clustered by question (the CR1 sandwich formula for a mean)."""
    present = ~np.isnan(scores_QT)
    clusters, total = int(np.count_nonzero(present.any(axis=1))), int(present.sum())
    if clusters < 2:
        return None
    residuals_QT = np.where(present, scores_QT - np.nanmean(scores_QT), 0.0)
    meat = float(np.sum(residuals_QT.sum(axis=1) ** 2))
    correction = clusters / (clusters - 1)
    return float(np.sqrt(correction * meat) / total)


@dataclass(frozen=True)
class Difference:
    """Mean over questions of the paired differences first - second, with interval and two-sided p-value.

    ``answers`` and the two means are of the answers that are graded for both models.
    """

    first: str
    second: str
    mean: float
    low: float
    high: float
    p_value: float
    questions: int
    answers: int
    first_mean: float
    second_mean: float
    p_holm: float = 1.0


def paired_differences(tables: Mapping[str, ScoreTable], draws: int = 2000, seed: int = 0) -> list[Difference]:
    """Compare all pairs of models on the questions for which both have scores, with Holm's correction over the pairs.

    A question's difference is the mean over the turns that are graded for both models. The p-value is that of a
    sign-flip permutation test (exact for few questions).
    """
    models = list(tables)
    found = []
    for i, first in enumerate(models):
        for second in models[i + 1 :]:
            difference = _difference(tables[first], tables[second], draws, seed)
            if difference is not None:
                found.append(difference)
    adjusted = holm([d.p_value for d in found])
    return [Difference(**{**d.__dict__, "p_holm": p}) for d, p in zip(found, adjusted, strict=True)]


def _difference(first: ScoreTable, second: ScoreTable, draws: int, seed: int) -> Difference | None:
    both = [q for q in first.question_ids if q in second.question_ids]
    first_QT = first.scores_QT[[first.question_ids.index(q) for q in both]]
    second_QT = second.scores_QT[[second.question_ids.index(q) for q in both]]
    differences_QT = first_QT - second_QT
    paired_QT = ~np.isnan(differences_QT)
    usable = np.asarray(paired_QT.any(axis=1))
    if np.count_nonzero(usable) < 2:
        return None
    differences_Q = np.nanmean(differences_QT[usable], axis=1)
    strata = [first.categories[first.question_ids.index(q)] for q, keep in zip(both, usable, strict=True) if keep]
    means_B = differences_Q[resample(strata, draws, seed)].mean(axis=1)
    low, high = np.quantile(means_B, [0.025, 0.975])
    return Difference(
        first=first.model, second=second.model, mean=float(differences_Q.mean()), low=float(low), high=float(high),
        p_value=sign_flip_p(differences_Q, 4 * draws, seed), questions=int(usable.sum()), answers=int(paired_QT.sum()),
        first_mean=float(first_QT[paired_QT].mean()), second_mean=float(second_QT[paired_QT].mean()),
    )  # fmt: skip


def sign_flip_p(differences_Q: Array, resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value for a mean of 0, by flipping signs at random. It is 1 if all differences are 0."""
    if not np.any(differences_Q):
        return 1.0
    test = stats.permutation_test(
        (differences_Q,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=1000,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def length_statistics(lengths: Sequence[int], scores: Sequence[float]) -> dict[str, float | None]:
    """Return mean and median answer length in characters, and Spearman's correlation of score and length."""
    if not lengths:
        return {"mean_characters": None, "median_characters": None, "spearman_score_length": None}
    constant = len(set(lengths)) < 2 or len(set(scores)) < 2 or len(lengths) < 3
    rho = None if constant else float(stats.spearmanr(lengths, scores).statistic)
    return {
        "mean_characters": float(np.mean(lengths)),
        "median_characters": float(np.median(lengths)),
        "spearman_score_length": rho,
    }
