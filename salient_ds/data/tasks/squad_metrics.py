"""Exact match and F1 of answers, by the rules of SQuAD's official evaluation scripts (v1.1 and v2.0). No torch.

Before they are compared, texts are lowercased, and punctuation, English articles and superfluous white space go.
Percentages: 100 is perfect. An example counts with the best of its answers.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """The form in which answers are compared: ``normalised("The  Elbe.") == "elbe"``."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predicted: str, wanted: str) -> float:
    """1 if both are the same after normalising, else 0."""
    return float(normalised(predicted) == normalised(wanted))


def f1(predicted: str, wanted: str, empty_matches: bool) -> float:
    """Harmonic mean of the shares of words that the two texts have in common.

    Args:
        empty_matches: texts without words match each other (v2.0). Otherwise they score 0 (v1.1).
    """
    found, gold = normalised(predicted).split(), normalised(wanted).split()
    if empty_matches and not (found and gold):
        return float(found == gold)
    common = sum((Counter(found) & Counter(gold)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(found), common / len(gold)
    return 2 * precision * recall / (precision + recall)


def squad_scores(
    predicted: Sequence[str], wanted: Sequence[Sequence[str]], metrics: Sequence[str], unanswerable: bool
) -> dict[str, float]:
    """The metrics named, in percent.

    Args:
        wanted: the answers of each example; none: it has no answer, and the empty text is right.
        unanswerable: rules of v2.0. The result then also has every metric over the questions that have an answer
            ("has_answer_f1") and over those that have none ("no_answer_f1"), if there are any.
    """
    rows = {
        name: [_best(name, text, answers, unanswerable) for text, answers in zip(predicted, wanted, strict=True)]
        for name in metrics
    }
    scores = {name: _percent(values) for name, values in rows.items()}
    if unanswerable:
        for prefix, answered in (("has_answer", True), ("no_answer", False)):
            chosen = [number for number, answers in enumerate(wanted) if bool(answers) == answered]
            if chosen:
                scores |= {f"{prefix}_{name}": _percent([values[n] for n in chosen]) for name, values in rows.items()}
    return scores


def best_thresholds(
    spans: Sequence[str | None], odds: Sequence[float], wanted: Sequence[Sequence[str]], metrics: Sequence[str]
) -> dict[str, float]:
    """The best value of each metric over all thresholds for "no answer" (v2.0), and the threshold that gives it.

    A question is answered if its odds are not above the threshold. Published numbers for v2.0 are often these
    ("best_f1"). They choose the threshold on the questions that they are computed on.

    Differs from the official script: questions with equal odds are decided together, so that the value can be had; and
    if no answer at all is best, the threshold is just below the smallest odds, where the script says 0.

    Args:
        spans: the best span of each question, whatever its odds; None: there is none.

    Returns:
        "best_f1" (percent) and "best_f1_threshold", for example.
    """
    order = sorted(range(len(odds)), key=lambda n: odds[n])
    found: dict[str, float] = {}
    for metric in metrics:
        empty = [_best(metric, "", answers, True) for answers in wanted]
        total = best = sum(empty)
        threshold = math.nextafter(odds[order[0]], -math.inf)
        for place, n in enumerate(order):
            span = spans[n]
            total += (empty[n] if span is None else _best(metric, span, wanted[n], True)) - empty[n]
            last_of_equals = place + 1 == len(order) or odds[order[place + 1]] > odds[n]
            if last_of_equals and total > best + 1e-9:
                best, threshold = total, odds[n]
        found |= {f"best_{metric}": 100 * best / len(order), f"best_{metric}_threshold": threshold}
    return found


def _best(metric: str, text: str, answers: Sequence[str], unanswerable: bool) -> float:
    if unanswerable:
        answers = [answer for answer in answers if normalised(answer)] or [""]
    if metric == "exact_match":
        return max(exact_match(text, answer) for answer in answers)
    return max(f1(text, answer, unanswerable) for answer in answers)


def _percent(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)
