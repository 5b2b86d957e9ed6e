"""From start and end logits of windows to one answer per question, as SQuAD's official baselines do it. No torch.

1. Each window gives its ``n_best`` starts and ends. A pair counts if both lie in the context, the end is not before the
   start, and it has at most ``max_answer_length`` tokens. Its score is the sum of the two logits.
2. "No answer" scores as the sum of both logits at the window's null token; of several windows the smallest counts.
3. The best pair of all windows wins, unless "no answer" is allowed and its score is larger by more than the threshold.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from salient_ds.data.tasks.base import Example, Features, Prediction


class Answering(NamedTuple):
    """How answers are chosen."""

    n_best: int
    max_answer_length: int
    null_threshold: float | None
    """None: every question gets an answer if there is any span."""


class _Span(NamedTuple):
    score: float
    start: int
    end: int


def best_answers(
    examples: Sequence[Example],
    features: Sequence[Features],
    nulls: Sequence[int],
    start_logits: Sequence[Any],
    end_logits: Sequence[Any],
    how: Answering,
) -> list[Prediction]:
    """One prediction per example, in order.

    Args:
        nulls: position of the null token, per window.
        start_logits: per window, at least as many as it has tokens; what follows is padding.
    """
    if not len(features) == len(start_logits) == len(end_logits):
        raise ValueError(f"{len(features)} windows, but {len(start_logits)} and {len(end_logits)} rows of logits")
    spans: list[list[_Span]] = [[] for _ in examples]
    null_scores = [float("inf")] * len(examples)
    for item, null, starts, ends in zip(features, nulls, start_logits, end_logits, strict=True):
        starts_S = np.asarray(starts, np.float64)[: len(item.offsets)]
        ends_S = np.asarray(ends, np.float64)[: len(item.offsets)]
        null_scores[item.example] = min(null_scores[item.example], float(starts_S[null] + ends_S[null]))
        spans[item.example] += _window_spans(starts_S, ends_S, item.offsets, how)
    return [
        _choose(example, found, null, how) for example, found, null in zip(examples, spans, null_scores, strict=True)
    ]


def write_answers(predictions: Sequence[Prediction], folder: Path, name: str, odds: bool) -> list[Path]:
    """Writes {id: text}, and {id: odds of "no answer"} beside it if ``odds``. Returns the files."""
    paths = [folder / name]
    answers = {str(prediction.id): prediction.value for prediction in predictions}
    paths[0].write_text(json.dumps(answers, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if odds:
        paths.append(folder / f"null_odds_{name}")
        found = {str(prediction.id): prediction.details["null_odds"] for prediction in predictions}
        paths[1].write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return paths


def _window_spans(
    starts_S: np.ndarray, ends_S: np.ndarray, offsets: Sequence[tuple[int, int]], how: Answering
) -> list[_Span]:
    found = []
    best_ends = [int(end) for end in np.argsort(-ends_S, kind="stable")[: how.n_best]]
    for start in np.argsort(-starts_S, kind="stable")[: how.n_best]:
        start = int(start)
        if offsets[start][1] <= offsets[start][0]:
            continue
        for end in best_ends:
            if end < start or end - start >= how.max_answer_length or offsets[end][1] <= offsets[end][0]:
                continue
            found.append(_Span(float(starts_S[start] + ends_S[end]), offsets[start][0], offsets[end][1]))
    return found


def _choose(example: Example, spans: list[_Span], null_score: float, how: Answering) -> Prediction:
    context = example.texts[1]
    ranked = sorted(spans, key=lambda span: -span.score)[: how.n_best]  # stable: of equals, the first one found
    scores = [span.score for span in ranked]
    allowed = how.null_threshold is not None
    # without any span, "no answer" is all that is left
    odds = null_score - scores[0] if scores else float("inf")
    everything = np.array(scores + ([null_score] if allowed or not scores else []))
    shares = np.exp(everything - everything.max())
    shares = shares / shares.sum()
    details = {"null_odds": odds if np.isfinite(odds) else float(np.finfo(np.float32).max)} if allowed else {}
    text = context[ranked[0].start : ranked[0].end].strip() if ranked else None
    span = text if allowed else None
    if text is None or (how.null_threshold is not None and odds > how.null_threshold):
        return Prediction(example.id, "", float(shares[-1]), details, span)
    return Prediction(example.id, text, float(shares[0]), details, span)
