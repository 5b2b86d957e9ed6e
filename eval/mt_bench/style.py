"""Style control: Bradley-Terry ratings with differences in length and formatting held equal.

A judge may prefer long or decorated answers whatever they say. So the chance that the first model wins is modelled with
the difference of the ratings plus, for every feature of style, a weight times the difference of the two answers in it.
What is left in the ratings is what style does not explain.

Source: the style control of Chatbot Arena and Arena-Hard (Li, Angelopoulos and Chiang, "Does style matter?", 2024).
Differs from the reference: lengths are counted in characters, and a ridge of 0.001 keeps weights finite.

Shapes: B = comparisons, M = models, S = features of style.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

from .statistics import Array
from .store import Answer, Row

FEATURES = ("length", "headings", "list items", "bold")
FEWEST = 20
"""Comparisons below which nothing is fitted."""
_RIDGE = 1e-3
_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)


@dataclass(frozen=True)
class StyleControl:
    """Ratings (a difference of 400 is odds of 10 to 1) without and with style, and the weight of every feature.

    A weight of 0.5 means: a difference of one standard deviation in the feature multiplies the odds by exp(0.5).
    """

    ratings: dict[str, float]
    controlled: dict[str, float]
    weights: dict[str, float]
    comparisons: int


def style_of(text: str) -> list[float]:
    """Return the :data:`FEATURES` of an answer. Formatting inside code blocks does not count."""
    prose = _FENCE.sub("", text)
    return [
        float(len(text)),
        float(len(re.findall(r"^ {0,3}#{1,6} ", prose, re.MULTILINE))),
        float(len(re.findall(r"^[ \t]*(?:[-*+]|[0-9]{1,3}[.)]) ", prose, re.MULTILINE))),
        float(len(re.findall(r"(?:\*\*|__)(?=\S)[^*_\n]{1,200}(?:\*\*|__)", prose))),
    ]


def style_control(
    rows: Sequence[Row], answers: Mapping[str, Mapping[int, Answer]], anchor: str | None = None
) -> StyleControl | str:
    """Fit ratings with and without style to pair judgments. Returns a sentence if that is not possible.

    Args:
        rows: rows of a ``_pair.jsonl`` file.
        answers: answers by model and question.
        anchor: the model whose rating is 0 (default: the first by name).
    """
    differences, sides, results = [], [], []
    for row in rows:
        games = (row["g1_winner"], row["g2_winner"])
        texts = [
            _turn(answers.get(row[side], {}).get(row["question_id"]), row["turn"]) for side in ("model_1", "model_2")
        ]
        if "error" in games or None in texts:
            continue
        one, two = (np.array(style_of(text or "")) for text in texts)
        differences.append((one - two) / np.maximum(one + two, 1.0))
        sides.append((row["model_1"], row["model_2"]))
        tie = games[0] != games[1] or games[0] == "tie"
        results.append(0.5 if tie else float(games[0] == "model_1"))
    models = sorted({model for pair in sides for model in pair})
    if len(results) < FEWEST or len(models) < 2:
        return f"needs {FEWEST} comparisons whose answers are at hand, there are {len(results)}"
    style_BS = np.array(differences)
    spread_S = style_BS.std(axis=0)
    style_BS = np.where(spread_S > 0, style_BS / np.where(spread_S > 0, spread_S, 1.0), 0.0)
    side_BM = np.zeros((len(sides), len(models)))
    for place, (first, second) in enumerate(sides):
        side_BM[place, models.index(first)] += 1.0
        side_BM[place, models.index(second)] -= 1.0
    zero = models.index(anchor) if anchor in models else 0
    plain = _fit(side_BM, np.array(results))
    both = _fit(np.hstack([side_BM, style_BS]), np.array(results))
    weights = {name: float(w) for name, w, s in zip(FEATURES, both[len(models) :], spread_S, strict=True) if s > 0}
    return StyleControl(_ratings(models, plain, zero), _ratings(models, both, zero), weights, len(results))


def _turn(answer: Answer | None, turn: int) -> str | None:
    return None if answer is None or len(answer.turns) < turn else answer.turns[turn - 1]


def _fit(features_BX: Array, results_B: Array) -> Array:
    """Weights (X) of a logistic regression without intercept; a tie counts as half a win for each side."""

    def loss(weights_X: Array) -> tuple[float, Array]:
        margin_B = features_BX @ weights_X
        value = np.sum(np.logaddexp(0.0, margin_B) - results_B * margin_B) + 0.5 * _RIDGE * np.sum(weights_X**2)
        return float(value), features_BX.T @ (special.expit(margin_B) - results_B) + _RIDGE * weights_X

    start = np.zeros(features_BX.shape[1])
    return np.asarray(optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"gtol": 1e-9}).x)


def _ratings(models: Sequence[str], weights_X: Array, zero: int) -> dict[str, float]:
    scale = 400.0 / np.log(10.0)
    return {model: float((weights_X[i] - weights_X[zero]) * scale) for i, model in enumerate(models)}
