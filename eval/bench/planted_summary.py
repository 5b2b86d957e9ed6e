"""Summarise runs as one row per arm and regime, and as sentences that the intervals support. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .planted_metrics import FEWEST, Estimate, estimate, paired, rank_scores
from .planted_plan import ORACLE, ORACLES, UNIFORM

Run = Mapping[str, Any]
BOUNDS = {
    "precision": (0.0, 1.0),
    "recall": (0.0, 1.0),
    "spearman": (-1.0, 1.0),
    "mean_difference": (0.0, float("inf")),
}
"""Possible range of each measure. Intervals are clipped to it."""


@dataclass(frozen=True)
class Row:
    """Results of one arm in one regime, over all seeds."""

    regime: str
    arm: str
    lr: float
    at_edge: bool
    """The best learning rate is the smallest or largest of the grid, so a better one may lie outside."""
    seeds: int
    failed: int
    kept: tuple[int, ...]
    """Total rank of each run."""
    estimates: dict[str, Estimate | None]
    """Mean and interval by name of the measure; None if it is undefined for all runs."""

    def side(self, measure: str, value: float) -> int:
        found = self.estimates[measure]
        return 0 if found is None else found.side_of(value)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def best_rates(tuning: Sequence[Run]) -> dict[tuple[str, str], float]:
    """Learning rate with the lowest held-out loss, by (regime, arm).

    The lower rate wins a tie. Where all runs diverged, there is no entry.
    """
    best: dict[tuple[str, str], tuple[float, float]] = {}
    for run in tuning:
        if run["loss"] is not None:
            key, candidate = (run["regime"], run["arm"]), (run["loss"], run["lr"])
            best[key] = min(best.get(key, candidate), candidate)
    return {key: lr for key, (_, lr) in best.items()}


def summarise(runs: Sequence[Run], grid: Sequence[float]) -> list[Row]:
    """Return a row for every arm and regime that has runs, in the order of their first run.

    Differences from the oracle and from uniform ranks are taken seed by seed, with the same network, teacher and data.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run["regime"], run["arm"]), []).append(run)
    return [_row(group, groups.get((regime, ORACLE), []), groups.get((regime, UNIFORM), []), grid)
            for (regime, _), group in groups.items()]  # fmt: skip


def _row(group: Sequence[Run], oracle: Sequence[Run], uniform: Sequence[Run], grid: Sequence[float]) -> Row:
    done = [run for run in group if run["loss"] is not None]
    scores = [rank_scores(run["recovered"], run["planted"]) for run in done]
    loss = [run["loss"] for run in done]
    estimates = {name: estimate([getattr(score, name) for score in scores], bounds) for name, bounds in BOUNDS.items()}
    estimates |= {
        "loss": estimate(loss),
        "above_oracle": paired(loss, _losses(oracle, done)),
        "above_uniform": paired(loss, _losses(uniform, done)),
        "update_error": estimate([run["update_error"] for run in done]),
    }
    lr = group[0]["lr"]
    return Row(
        regime=group[0]["regime"], arm=group[0]["arm"], lr=lr, at_edge=len(grid) > 1 and lr in (min(grid), max(grid)),
        seeds=len(done), failed=len(group) - len(done), kept=tuple(sum(run["recovered"]) for run in done),
        estimates=estimates,
    )  # fmt: skip


def _losses(others: Sequence[Run], runs: Sequence[Run]) -> list[float | None]:
    """Losses of another arm at the seeds of ``runs``; None for missing or diverged ones."""
    by_seed = {other["seed"]: other["loss"] for other in others}
    return [by_seed.get(run["seed"]) for run in runs]


def findings(rows: Sequence[Row], budget: int) -> list[str]:
    """Sentences about one regime: what the intervals show, and what they leave open."""
    if max(row.seeds for row in rows) < FEWEST:
        return [f"Fewer than {FEWEST} seeds: no intervals, and nothing to claim."]
    by_name = {row.arm: row for row in rows}
    others = [row for row in rows if row.arm not in (ORACLE, UNIFORM)]
    adaptive = [row for row in others if _varies(row)]
    lines = [*_reference_line(by_name.get(ORACLE))]
    base = by_name.get(UNIFORM)
    if base is not None and (level := base.estimates["recall"]) is not None:
        lines.append(
            f"Recall against that of uniform ranks ({level.mean:.3g}): "
            + _sides(adaptive, lambda row: row.side("recall", level.mean), "higher", "lower")
        )
    lines.append(
        "Spearman of recovered and planted ranks: " + _sides(adaptive, lambda row: row.side("spearman", 0), "above 0",
                                                             "below 0")
    )  # fmt: skip
    lines.append(
        f"Loss against {UNIFORM}, seed by seed: "
        + _sides(others, lambda row: -row.side("above_uniform", 0), "lower", "higher")
    )
    lines.append(
        f"Loss against {ORACLE}, seed by seed: "
        + _sides(others, lambda row: -row.side("above_oracle", 0), "lower", "higher")
    )
    lines += [
        f"{row.arm} did not end at the budget of {budget}: its runs kept {', '.join(map(str, row.kept))}."
        for row in rows
        if row.kept and set(row.kept) != {budget}
    ]
    edges = [f"{row.arm} ({row.lr:g})" for row in rows if row.at_edge]
    if edges:
        lines.append(f"Best learning rate at the edge of the grid, a better one may lie outside: {', '.join(edges)}.")
    return lines


def _varies(row: Row) -> bool:
    """Whether the arm decides ranks at all (the ranks of fixed methods are not a finding)."""
    return row.estimates["spearman"] is not None and row.arm not in ORACLES


def _reference_line(oracle: Row | None) -> Iterator[str]:
    """Say whether the true ranks give a lower loss than uniform ones. If not, losses say nothing about ranks."""
    if oracle is None or (gain := oracle.estimates["above_uniform"]) is None:
        return
    verdict = {
        -1: "the true ranks reach a lower loss than uniform ones, so that there is something to find",
        0: "the losses of true and uniform ranks are not told apart, so that losses say nothing about ranks here",
        1: "the true ranks do WORSE than uniform ones: the losses measure something else than ranks here",
    }[gain.side_of(0)]
    yield f"Control: {verdict} (difference {show(gain)})."


def _sides(rows: Sequence[Row], side: Callable[[Row], int], good: str, bad: str) -> str:
    """List the arms by the side on which their interval lies."""
    found: dict[int, list[str]] = {1: [], -1: [], 0: []}
    for row in rows:
        found[side(row)].append(row.arm)
    words = {1: good, -1: bad, 0: "not told apart"}
    parts = [f"{words[key]}: {', '.join(names)}" for key, names in found.items() if names]
    return ("; ".join(parts) or "no arm") + "."


def show(value: Estimate | None) -> str:
    """Format as ``mean [low, high]``, as the mean alone without interval or spread, or as ``-`` if undefined."""
    if value is None:
        return "-"
    if value.low is None or value.high is None or value.low == value.high:
        return f"{value.mean:.3g}"
    return f"{value.mean:.3g} [{value.low:.3g}, {value.high:.3g}]"
