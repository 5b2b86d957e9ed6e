"""The part of a report about comparisons: all of them, by category, by order, and with style held equal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from . import pairs
from .pairs import pair_counts, summarise_pairs
from .report_options import ReportOptions
from .store import Answer, Row
from .style import style_control

UNSTABLE = 1 / 3
"""Share of comparisons with disagreeing orders above which a win rate is marked."""


def pair_part(
    rows: Sequence[Row], answers: Mapping[str, Mapping[int, Answer]], options: ReportOptions
) -> dict[str, Any]:
    """Report comparisons: counts, adjusted win rates with intervals, the judge's consistency, Bradley-Terry ratings."""
    summary = pairs.summarise_pairs(rows)
    counts = pairs.pair_counts(summary.battles, options.baseline)
    error_rate = summary.errors / summary.matches
    shown = error_rate <= options.max_cell_failure_rate and bool(counts)
    intervals = pairs.win_rate_intervals(summary.battles, options.baseline, options.draws) if shown else {}
    ratings: dict[str, float] | str = f"left out: {error_rate:.1%} of the comparisons have no verdict"
    rating_intervals: dict[str, tuple[float, float]] = {}
    if shown:
        try:
            ratings = pairs.bradley_terry(summary.battles, options.baseline)
            rating_intervals = pairs.bradley_terry_intervals(summary.battles, options.baseline)
        except ValueError as error:
            ratings = str(error)
    orders = order_disagreement(rows, options.baseline)
    controlled = style_control(rows, answers, options.baseline)
    return {
        "baseline": options.baseline,
        "matches": summary.matches,
        "errors": summary.errors,
        "flip_rate": summary.flip_rate,
        "first_shown_rate": summary.first_shown_rate,
        "models": [
            {
                "model": model,
                "win": count.win,
                "loss": count.loss,
                "tie": count.tie,
                **{name: rate if shown else None for name, rate in count.rates().items()},
                "interval": intervals.get(model),
                "orders_disagree": orders[model],
                "unstable": orders[model] > UNSTABLE,
            }
            for model, count in sorted(counts.items(), key=lambda item: -item[1].rates()["win_rate_adjusted"])
        ],
        "head_to_head": [
            {"first": first, "second": second, "win": c.win, "loss": c.loss, "tie": c.tie}
            for (first, second), c in pairs.head_to_head(summary.battles).items()
        ],
        "bradley_terry": ratings,
        "bradley_terry_intervals": rating_intervals,
        "categories": by_category(rows, options.categories, options.baseline),
        "style_control": controlled if isinstance(controlled, str) else asdict(controlled),
    }


def by_category(
    rows: Iterable[Row], names: Mapping[int, str], baseline: str | None
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return wins, losses, ties and the adjusted win rate by category and model.

    Args:
        rows: rows of a ``_pair.jsonl`` file.
        names: category by question id; rows of other questions name their own, or are "unknown".
        baseline: only count comparisons against this model.
    """
    groups: dict[str, list[Row]] = {name: [] for name in names.values()}  # in the order of the questions
    for row in rows:
        groups.setdefault(names.get(row["question_id"]) or row.get("category") or "unknown", []).append(row)
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, group in groups.items():
        if not group:
            continue
        counts = pair_counts(summarise_pairs(group).battles, baseline)
        found[name] = {
            model: {"win": c.win, "loss": c.loss, "tie": c.tie, "win_rate_adjusted": c.rates()["win_rate_adjusted"]}
            for model, c in counts.items()
        }
    return found


def order_disagreement(rows: Sequence[Row], baseline: str | None) -> dict[str, float]:
    """Share of each model's comparisons, with a verdict in both orders, whose two orders disagree."""
    mine: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        sides, games = (row["model_1"], row["model_2"]), (row["g1_winner"], row["g2_winner"])
        if "error" in games or (baseline is not None and baseline not in sides):
            continue
        for model in sides:
            mine[model].append(games[0] != games[1])
    return {model: sum(flips) / len(flips) for model, flips in sorted(mine.items())}
