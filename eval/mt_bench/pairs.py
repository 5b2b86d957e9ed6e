"""Statistics of comparisons: wins, losses, ties, consistency of the judge, Bradley-Terry ratings.

Shapes: wins_MM[i, j] is how often model i beat model j (M models; a tie is half a win for each).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, sparse
from scipy.sparse import csgraph

from .statistics import Array, resample
from .store import Row


@dataclass
class PairCounts:
    """Wins, losses and ties of one model. A match counts as won only if the model wins in both orders."""

    win: int = 0
    loss: int = 0
    tie: int = 0

    @property
    def total(self) -> int:
        return self.win + self.loss + self.tie

    def rates(self) -> dict[str, float]:
        n = max(self.total, 1)
        return {
            "win_rate": self.win / n,
            "loss_rate": self.loss / n,
            "win_rate_adjusted": (self.win + 0.5 * self.tie) / n,
        }


@dataclass(frozen=True)
class Battle:
    """One comparison with a verdict in both orders. ``result`` is 1 (first wins), 0 (second wins) or 0.5 (tie)."""

    question_id: int
    first: str
    second: str
    result: float


@dataclass(frozen=True)
class PairSummary:
    battles: tuple[Battle, ...]
    matches: int
    errors: int
    flips: int
    first_shown_wins: int
    decided_games: int

    @property
    def flip_rate(self) -> float | None:
        """Fraction of comparisons whose two orders disagree."""
        return self.flips / len(self.battles) if self.battles else None

    @property
    def first_shown_rate(self) -> float | None:
        """Fraction of decided games won by the answer shown first. It is 0.5 without position bias."""
        return self.first_shown_wins / self.decided_games if self.decided_games else None


def summarise_pairs(rows: Iterable[Row]) -> PairSummary:
    """Compute battles and the judge's consistency from the rows of a ``_pair.jsonl`` file."""
    battles, errors, flips, first_shown, decided, total = [], 0, 0, 0, 0, 0
    for row in rows:
        total += 1
        games = (row["g1_winner"], row["g2_winner"])
        first_shown += (games[0] == "model_1") + (games[1] == "model_2")
        decided += sum(game in ("model_1", "model_2") for game in games)
        if "error" in games:
            errors += 1
            continue
        flips += games[0] != games[1]
        result = 0.5 if games[0] != games[1] or games[0] == "tie" else float(games[0] == "model_1")
        battles.append(Battle(row["question_id"], row["model_1"], row["model_2"], result))
    return PairSummary(tuple(battles), total, errors, flips, first_shown, decided)


def pair_counts(battles: Iterable[Battle], baseline: str | None = None) -> dict[str, PairCounts]:
    """Count wins, losses and ties by model. With ``baseline``, only count matches against it, and leave out its row."""
    counts: dict[str, PairCounts] = defaultdict(PairCounts)
    for battle in battles:
        if baseline is not None and baseline not in (battle.first, battle.second):
            continue
        names = {1.0: ("win", "loss"), 0.0: ("loss", "win"), 0.5: ("tie", "tie")}[battle.result]
        for model, name in zip((battle.first, battle.second), names, strict=True):
            setattr(counts[model], name, getattr(counts[model], name) + 1)
    counts.pop(baseline or "", None)
    return dict(sorted(counts.items()))


def head_to_head(battles: Iterable[Battle]) -> dict[tuple[str, str], PairCounts]:
    """Count wins, losses and ties for each pair of models, from the view of the one whose name sorts first."""
    groups: dict[tuple[str, str], list[Battle]] = defaultdict(list)
    for battle in battles:
        one, two = sorted((battle.first, battle.second))
        groups[one, two].append(battle)
    return {pair: pair_counts(group)[pair[0]] for pair, group in sorted(groups.items())}


def win_rate_intervals(
    battles: Sequence[Battle], baseline: str | None = None, draws: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of the adjusted win rate. Questions are resampled together with all their battles."""
    used = [b for b in battles if baseline is None or baseline in (b.first, b.second)]
    ids = sorted({b.question_id for b in used})
    models = sorted({m for b in used for m in (b.first, b.second)} - {baseline})
    points_MQ, games_MQ = np.zeros((len(models), len(ids))), np.zeros((len(models), len(ids)))
    for battle in used:
        q = ids.index(battle.question_id)
        for model, result in ((battle.first, battle.result), (battle.second, 1.0 - battle.result)):
            if model in models:
                points_MQ[models.index(model), q] += result
                games_MQ[models.index(model), q] += 1
    draws_BQ = resample(["all"] * len(ids), draws, seed)
    intervals = {}
    for m, model in enumerate(models):
        games_B = games_MQ[m][draws_BQ].sum(axis=1)
        rates_B = points_MQ[m][draws_BQ].sum(axis=1)[games_B > 0] / games_B[games_B > 0]
        low, high = np.quantile(rates_B, [0.025, 0.975])
        intervals[model] = (float(low), float(high))
    return intervals


def bradley_terry(battles: Sequence[Battle], anchor: str | None = None, scale: float = 400.0) -> dict[str, float]:
    """Compute Bradley-Terry ratings (base 10). A tie counts as half a win.

    They are the maximum-likelihood estimate without regularisation. Only differences of ratings are meaningful.

    Args:
        anchor: the model whose rating is set to 0 (default: the first by name).
        scale: rating difference that corresponds to odds of 10 to 1.

    Raises:
        ValueError: there are fewer than two models, or no finite maximum: some group of models never lost, or never
            won, against the rest.
    """
    models = sorted({m for b in battles for m in (b.first, b.second)})
    if len(models) < 2:
        raise ValueError(f"Bradley-Terry needs at least two models, the battles have {models}")
    place = {model: i for i, model in enumerate(models)}
    wins_MM = np.zeros((len(models), len(models)))
    for battle in battles:
        wins_MM[place[battle.first], place[battle.second]] += battle.result
        wins_MM[place[battle.second], place[battle.first]] += 1.0 - battle.result
    parts, labels = csgraph.connected_components(sparse.csr_array(wins_MM), directed=True, connection="strong")
    if parts > 1:
        groups = [[m for m in models if labels[place[m]] == part] for part in range(parts)]
        raise ValueError(f"no finite Bradley-Terry ratings: between the groups {groups} one side won every time")

    def loss(theta_M: Array) -> tuple[float, Array]:
        delta_MM = theta_M[:, None] - theta_M[None, :]
        excess_MM = wins_MM * -1.0 / (1.0 + np.exp(delta_MM))
        gradient_M = excess_MM.sum(axis=1) - excess_MM.sum(axis=0)
        return float(np.sum(wins_MM * np.logaddexp(0.0, -delta_MM))), gradient_M

    best = optimize.minimize(
        loss, np.zeros(len(models)), jac=True, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-10}
    )
    rating_M = best.x * scale / np.log(10.0)
    zero = rating_M[place[anchor or models[0]]]
    return {model: float(rating_M[i] - zero) for i, model in enumerate(models)}


def bradley_terry_intervals(
    battles: Sequence[Battle], anchor: str | None = None, draws: int = 200, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % bootstrap intervals of the ratings, resampled by question. Draws without a finite maximum are left out.

    Empty if more than a tenth of the draws have no finite maximum, because intervals from the others would be too
    narrow.
    """
    by_question: dict[int, list[Battle]] = defaultdict(list)
    for battle in battles:
        by_question[battle.question_id].append(battle)
    ids = sorted(by_question)
    found: dict[str, list[float]] = defaultdict(list)
    failed = 0
    for draw_Q in resample(["all"] * len(ids), draws, seed):
        try:
            ratings = bradley_terry([b for q in draw_Q for b in by_question[ids[q]]], anchor)
        except ValueError:
            failed += 1
            continue
        for model, rating in ratings.items():
            found[model].append(rating)
    if failed > draws / 10:
        return {}
    return {m: (float(np.quantile(r, 0.025)), float(np.quantile(r, 0.975))) for m, r in sorted(found.items())}
