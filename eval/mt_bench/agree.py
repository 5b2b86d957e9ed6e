"""Agreement of two judges: raw agreement with and without ties, and Cohen's kappa.

A vote compares two answers to one turn of a question. Pair judgments, single judgments (the higher score wins) and
human votes in FastChat's format are all read into the same table.
Source: agreement as in Zheng et al. 2023, section 4.2; kappa: Cohen 1960.
Differs from the reference: works for any two judges, adds kappa, and can compare single with pair judgments.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np

from .statistics import resample
from .store import Row, read_rows

Key = tuple[int, int, str, str]
Votes = dict[Key, list[str]]
OUTCOMES = ("first", "tie", "second")


@dataclass(frozen=True)
class Agreement:
    """Counts of agreeing votes over pairs of votes on the same comparison. Kappa is over the three outcomes."""

    turn: int | None
    agree_with_ties: int
    total_with_ties: int
    agree_without_ties: int
    total_without_ties: int
    kappa: float | None
    kappa_interval: tuple[float, float] | None

    @property
    def with_ties(self) -> float | None:
        return self.agree_with_ties / self.total_with_ties if self.total_with_ties else None

    @property
    def without_ties(self) -> float | None:
        return self.agree_without_ties / self.total_without_ties if self.total_without_ties else None


def load_votes(path: Path, judge: str | None = None, tie_margin: float = 0.0) -> Votes:
    """Read votes from a judgment file (single or pair) or a human vote file (JSON list, or one object per line).

    Args:
        path: the file.
        judge: keep only votes whose judge name starts with this text.
        tie_margin: two single scores that differ by at most this much count as a tie.

    Raises:
        ValueError: the file holds no votes (of this judge).
    """
    rows = _read_any(path)
    if judge is not None:
        rows = [row for row in rows if _judge_of(row).startswith(judge)]
    if not rows:
        raise ValueError(f"{path} holds no votes" + (f" of a judge {judge!r}" if judge else ""))
    if "score" in rows[0]:
        return _votes_from_scores(rows, tie_margin)
    votes: Votes = defaultdict(list)
    for key, outcome in _votes_from_comparisons(rows):
        votes[key].append(outcome)
    return dict(votes)


def agreement(first: Votes, second: Votes | None = None, turn: int | None = None, draws: int = 1000) -> Agreement:
    """Compute the agreement of two judges. With ``second`` None, compare all pairs of votes within ``first``.

    Args:
        turn: use only this turn; None: both.
        draws: bootstrap draws for the interval of kappa, which resamples questions.
    """
    by_question: dict[int, list[tuple[str, str]]] = defaultdict(list)
    for key, mine in first.items():
        if turn is not None and key[1] != turn:
            continue
        pairs: Iterable[tuple[str, str]]
        pairs = combinations(mine, 2) if second is None else product(mine, second.get(key, []))
        by_question[key[0]] += list(pairs)
    flat = [pair for pairs in by_question.values() for pair in pairs]
    decided = [pair for pair in flat if "tie" not in pair]
    counts_Q33 = np.array([_confusion(pairs, second is None) for pairs in by_question.values()])
    interval = None
    if len(by_question) > 1:
        draws_BQ = resample(["all"] * len(counts_Q33), draws, seed=0)
        kappas = [k for k in (cohen_kappa(counts_Q33[d].sum(axis=0)) for d in draws_BQ) if k is not None]
        if kappas:
            interval = (float(np.quantile(kappas, 0.025)), float(np.quantile(kappas, 0.975)))
    kappa = cohen_kappa(counts_Q33.sum(axis=0)) if flat else None
    same = sum(a == b for a, b in flat)
    return Agreement(
        turn=turn,
        agree_with_ties=same,
        total_with_ties=len(flat),
        agree_without_ties=sum(a == b for a, b in decided),
        total_without_ties=len(decided),
        kappa=kappa,
        kappa_interval=interval,
    )


def cohen_kappa(counts_33: Any) -> float | None:
    """Compute (observed - chance) / (1 - chance) from a square table of counts.

    None if the table is empty, or if agreement by chance is certain.
    """
    total = counts_33.sum()
    if total == 0:
        return None
    observed = np.trace(counts_33) / total
    chance = float(counts_33.sum(axis=0) @ counts_33.sum(axis=1)) / total**2
    return None if chance >= 1.0 else float((observed - chance) / (1.0 - chance))


def _confusion(pairs: Sequence[tuple[str, str]], symmetric: bool) -> Any:
    """Count the votes of two raters in a 3 x 3 table. Within a group no rater is the first, so both orders count."""
    counts_33 = np.zeros((3, 3))
    for a, b in pairs:
        counts_33[OUTCOMES.index(a), OUTCOMES.index(b)] += 1
        if symmetric:
            counts_33[OUTCOMES.index(b), OUTCOMES.index(a)] += 1
    return counts_33


def _read_any(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8")
    return list(json.loads(text)) if text.lstrip().startswith("[") else list(read_rows(path))


def _judge_of(row: Row) -> str:
    judge = row.get("judge", "")
    return str(judge[0] if isinstance(judge, list) else judge)


def _votes_from_comparisons(rows: Iterable[Row]) -> Iterator[tuple[Key, str]]:
    """Read votes from FastChat's judgment rows (two games) and vote rows (winner model_a, model_b or tie...)."""
    for row in rows:
        one = row.get("model_1") or row.get("model_a")
        two = row.get("model_2") or row.get("model_b")
        if "g1_winner" in row:
            if "error" in (row["g1_winner"], row["g2_winner"]):
                continue
            winner = row["g1_winner"] if row["g1_winner"] == row["g2_winner"] else "tie"
        else:
            winner = row["winner"]
        outcome = "tie" if "tie" in winner else "first" if winner in ("model_1", "model_a") else "second"
        yield _sorted(row["question_id"], row["turn"], str(one), str(two), outcome)


def _votes_from_scores(rows: Sequence[Row], margin: float) -> Votes:
    """Compare the scores of all pairs of models on each turn. Rows without a score give no vote."""
    scores: dict[tuple[int, int, int], dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["score"] != -1:
            scores[row["question_id"], row["turn"], row.get("repeat", 0)][row["model"]] = row["score"]
    votes: Votes = defaultdict(list)
    for (question, turn, _), by_model in scores.items():
        for one, two in combinations(sorted(by_model), 2):
            difference = by_model[one] - by_model[two]
            outcome = "tie" if abs(difference) <= margin else "first" if difference > 0 else "second"
            votes[question, turn, one, two].append(outcome)
    return dict(votes)


def _sorted(question: int, turn: int, one: str, two: str, outcome: str) -> tuple[Key, str]:
    """Put the two models into sorted order, so that a comparison has one key, whichever model was named first."""
    if one < two:
        return (question, turn, one, two), outcome
    return (question, turn, two, one), {"first": "second", "second": "first", "tie": "tie"}[outcome]
