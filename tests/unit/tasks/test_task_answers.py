"""Choosing answers: against a search over every span, and the threshold of "no answer"."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salient_ds.data.tasks.base import Example, Features
from salient_ds.data.tasks.best_spans import Answering, best_answers

WORDS = ["a", "bb", "ccc", "dddd", "e", "ff", "ggg", "hhhh"]
CONTEXT = " ".join(WORDS)
STARTS = [CONTEXT.index(word) for word in WORDS]
SPANS = [(start, start + len(word)) for start, word in zip(STARTS, WORDS, strict=True)]
EXAMPLE = Example("q", ("which?", CONTEXT))


def window(first: int, last: int, example: int = 0) -> Features:
    """Words first to last - 1 behind three tokens of the question and its null token, and one special token."""
    offsets = [(0, 0)] * 3 + SPANS[first:last] + [(0, 0)]
    return Features(example, {"input_ids": list(range(len(offsets)))}, 1, False, offsets)


def every_score(features: list[Features], starts: list[Any], ends: list[Any], longest: int) -> float:
    """The best score among all spans."""
    best = -np.inf
    for item, start_S, end_S in zip(features, starts, ends, strict=True):
        inside = [token for token, (a, b) in enumerate(item.offsets) if b > a]
        for first in inside:
            for last in inside:
                if first <= last < first + longest:
                    best = max(best, start_S[first] + end_S[last])
    return best


logits = st.lists(st.integers(-50, 50).map(float), min_size=16, max_size=16, unique=True)


@settings(max_examples=60, deadline=None)
@given(logits, logits, st.integers(1, 8))
def test_the_best_span_of_all_windows_wins(starts: list[float], ends: list[float], longest: int) -> None:
    features = [window(0, 4), window(3, 8)]
    halves = [starts[:8], starts[8:] + [0.0]], [ends[:8], ends[8:] + [0.0]]
    start_rows = [np.array(row) for row in halves[0]]
    end_rows = [np.array(row) for row in halves[1]]
    (found,) = best_answers([EXAMPLE], features, [0, 0], start_rows, end_rows, Answering(20, longest, None))
    assert _score_of(found.value, features, start_rows, end_rows, longest) == every_score(
        features, start_rows, end_rows, longest
    )


def _score_of(text: str, features: list[Features], starts: list[Any], ends: list[Any], longest: int) -> float:
    """The best score of the spans with this text."""
    scores = [-np.inf]
    for item, start_S, end_S in zip(features, starts, ends, strict=True):
        for first in range(3, len(item.offsets) - 1):
            for last in range(first, min(first + longest, len(item.offsets) - 1)):
                if CONTEXT[item.offsets[first][0] : item.offsets[last][1]] == text:
                    scores.append(start_S[first] + end_S[last])
    return max(scores)


def flat(size: int, **peaks: float) -> np.ndarray:
    row = np.zeros(size)
    for place, value in peaks.items():
        row[int(place[1:])] = value
    return row


def test_an_answer_neither_ends_before_its_start_nor_lies_outside_of_the_context() -> None:
    item = window(0, 8)
    starts, ends = flat(12, _1=9, _6=5, _3=4), flat(12, _11=9, _4=5, _8=3)
    (found,) = best_answers([EXAMPLE], [item], [0], [starts], [ends], Answering(20, 30, None))
    assert found.value == "a bb"  # 4 + 5; the pair (6, 4) would have 10


def test_answers_are_not_longer_than_allowed() -> None:
    item = window(0, 8)
    starts, ends = flat(12, _3=9), flat(12, _9=5, _5=4)
    values = [
        best_answers([EXAMPLE], [item], [0], [starts], [ends], Answering(20, longest, None))[0].value
        for longest in (1, 3, 7)
    ]
    assert values == ["a", "a bb ccc", "a bb ccc dddd e ff ggg"]


def test_only_the_n_best_starts_and_ends_are_tried() -> None:
    item = window(0, 8)
    starts, ends = flat(12, _5=9, _4=8), flat(12, _3=9, _4=7, _6=6)  # the best end lies before the best start
    assert best_answers([EXAMPLE], [item], [0], [starts], [ends], Answering(1, 30, None))[0].value == ""
    assert best_answers([EXAMPLE], [item], [0], [starts], [ends], Answering(3, 30, None))[0].value in ("bb", "ccc dddd")


def test_no_answer_needs_a_margin_above_the_threshold() -> None:
    item = window(0, 8)
    starts, ends = flat(12, _0=4, _5=3), flat(12, _0=4, _5=3)  # null 8, best span 6
    for threshold, value in ((0.0, ""), (1.9, ""), (2.0, "ccc"), (5.0, "ccc")):
        (found,) = best_answers([EXAMPLE], [item], [0], [starts], [ends], Answering(20, 30, threshold))
        assert (found.value, found.details["null_odds"]) == (value, 2.0)
    (found,) = best_answers([EXAMPLE], [item], [0], [starts], [ends], Answering(20, 30, None))
    assert (found.value, found.details) == ("ccc", {})


def test_the_smallest_null_score_of_the_windows_counts() -> None:
    items = [window(0, 4), window(4, 8)]
    starts = [flat(8, _0=9, _5=3), flat(8, _0=1)]
    (found,) = best_answers([EXAMPLE], items, [0, 0], starts, starts, Answering(20, 30, 0.0))
    assert (found.value, found.details["null_odds"]) == ("ccc", 2.0 - 6.0)


def test_padding_of_logits_is_not_read() -> None:
    item = window(0, 8)
    rows = [flat(16, _5=3, _14=99), flat(16, _6=3, _15=99)]
    assert best_answers([EXAMPLE], [item], [0], [rows[0]], [rows[1]], Answering(20, 30, None))[0].value == "ccc dddd"


def test_every_window_needs_its_logits() -> None:
    with pytest.raises(ValueError, match="2 windows, but 1 and 1 rows of logits"):
        best_answers([EXAMPLE], [window(0, 4), window(4, 8)], [0, 0], [flat(8)], [flat(8)], Answering(20, 30, None))


def test_scores_are_probabilities() -> None:
    item = window(0, 8)
    scores = []
    for peak in (0.0, 2.0, 8.0):
        row = flat(12, _5=peak)
        scores.append(best_answers([EXAMPLE], [item], [0], [row], [row], Answering(20, 30, None))[0].score or 0.0)
    assert all(0 < a < b <= 1 for a, b in pairwise(scores))
