"""Metrics as pure functions of predictions and references, each computed by a well-known library.

scikit-learn and rouge-score come with the extra ``tasks``; they are imported when a metric is computed. Values are
fractions (accuracy 0.9), correlations or errors. ROUGE and the measures of SQuAD are in percent, as in their papers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import NamedTuple

EXTRA = "pip install 'salient-ds[tasks]'"
_PACKAGES = {"sklearn": "scikit-learn", "rouge_score": "rouge-score"}


class Metric(NamedTuple):
    """What is known about a metric without computing it."""

    needs: str | None = None
    """The library that computes it, if it is not always installed."""
    lower_is_better: bool = False


CLASSIFICATION = {name: Metric("sklearn") for name in ("accuracy", "f1", "f1_macro", "matthews")}
REGRESSION = {
    "pearson": Metric(),
    "spearman": Metric(),
    "correlation": Metric(),
    "mse": Metric("sklearn", lower_is_better=True),
    "mae": Metric("sklearn", lower_is_better=True),
}
SUMMARIES = {name: Metric("rouge_score") for name in ("rouge1", "rouge2", "rougeL", "rougeLsum")}
ANSWERS = {"exact_match": Metric(), "f1": Metric()}
EVERY_NAME = frozenset({*CLASSIFICATION, *REGRESSION, *SUMMARIES, *ANSWERS})


def missing_libraries(metrics: Mapping[str, Metric]) -> list[str]:
    """One sentence per library that these metrics need and that is not installed."""
    return [
        f"the metrics {', '.join(n for n, metric in metrics.items() if metric.needs == library)} need {package}, which "
        f"is not installed: {EXTRA}"
        for library, package in _PACKAGES.items()
        if any(metric.needs == library for metric in metrics.values()) and find_spec(library) is None
    ]


def require_libraries(metrics: Mapping[str, Metric]) -> None:
    """Raises ValueError when a library is missing, see :func:`missing_libraries`."""
    missing = missing_libraries(metrics)
    if missing:
        raise ValueError("\n".join(missing))


def classification_scores(predicted: Sequence[int], wanted: Sequence[int], metrics: Sequence[str]) -> dict[str, float]:
    """Metrics of numbered classes, by scikit-learn.

    ``f1`` is that of class 1, as in GLUE. A class that is never predicted has F1 0.
    """
    require_libraries({name: CLASSIFICATION[name] for name in metrics})
    from sklearn import metrics as sk

    functions = {
        "accuracy": lambda: sk.accuracy_score(wanted, predicted),
        "f1": lambda: sk.f1_score(wanted, predicted, pos_label=1, average="binary", zero_division=0),
        "f1_macro": lambda: sk.f1_score(wanted, predicted, average="macro", zero_division=0),
        "matthews": lambda: sk.matthews_corrcoef(wanted, predicted),
    }
    return {name: float(functions[name]()) for name in metrics}


def regression_scores(predicted: Sequence[float], wanted: Sequence[float], metrics: Sequence[str]) -> dict[str, float]:
    """Metrics of numbers, by scipy and scikit-learn.

    ``correlation`` is the mean of Pearson's and Spearman's, the number that papers give for STS-B. Correlations are nan
    if all predictions or all references are equal, or if there is only one.
    """
    require_libraries({name: REGRESSION[name] for name in metrics})
    found: dict[str, float] = {}
    for name in metrics:
        if name in ("mse", "mae"):
            from sklearn import metrics as sk

            function = sk.mean_squared_error if name == "mse" else sk.mean_absolute_error
            found[name] = float(function(wanted, predicted))
        else:
            kinds = ("pearson", "spearman") if name == "correlation" else (name,)
            found[name] = sum(_correlation(kind, predicted, wanted) for kind in kinds) / len(kinds)
    return found


def _correlation(kind: str, predicted: Sequence[float], wanted: Sequence[float]) -> float:
    from scipy import stats

    if len(wanted) < 2:
        return float("nan")
    function = stats.pearsonr if kind == "pearson" else stats.spearmanr
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(function(predicted, wanted).statistic)
