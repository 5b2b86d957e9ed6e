"""A panel of judges: the mean of their averages for each model, and how far each two of them agree."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from .agree import agreement, load_votes
from .markdown import number, percent, plain, table
from .report import Report
from .store import Layout, file_name


@dataclass(frozen=True)
class Panel:
    """What several judges say of the same models.

    ``models``: average and adjusted win rate by judge, and their means over the judges that gave one, best first.
    ``agreement``: of each two judges, on single scores (the higher one wins) and on comparisons.
    """

    judges: tuple[str, ...]
    models: list[dict[str, Any]]
    agreement: list[dict[str, Any]]


def build_panel(reports: Mapping[str, Report], layout: Layout, references: str, draws: int) -> Panel:
    """Put the reports of several judges side by side. ``reports``: by judge."""
    averages = {judge: _by_model(report, "single", "average_pooled") for judge, report in reports.items()}
    rates = {judge: _by_model(report, "pair", "win_rate_adjusted") for judge, report in reports.items()}
    names = list(dict.fromkeys(m for found in (*averages.values(), *rates.values()) for m in found))
    models: list[dict[str, Any]] = [
        {
            "model": name,
            "averages": {judge: found.get(name) for judge, found in averages.items()},
            "average": _mean([found.get(name) for found in averages.values()]),
            "win_rates": {judge: found.get(name) for judge, found in rates.items()},
            "win_rate": _mean([found.get(name) for found in rates.values()]),
        }
        for name in names
    ]
    models.sort(key=lambda entry: (-(entry["average"] or -1.0), -(entry["win_rate"] or -1.0)))
    return Panel(tuple(reports), models, _agreements(tuple(reports), layout, references, draws))


def _by_model(report: Report, part: str, name: str) -> dict[str, float | None]:
    entries = report.get(part, {}).get("models", [])
    return {e["model"]: e[name]["mean"] if isinstance(e[name], dict) else e[name] for e in entries}


def _mean(values: list[float | None]) -> float | None:
    """Mean over all judges; None if one of them has no value, since judges differ in how strict they are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _agreements(judges: tuple[str, ...], layout: Layout, references: str, draws: int) -> list[dict[str, Any]]:
    found = []
    for kind in ("single", "pair"):
        files = {judge: layout.judgments(judge, kind, references) for judge in judges}
        votes = {judge: load_votes(file) for judge, file in files.items() if file.is_file()}
        for first, second in combinations(votes, 2):
            both = agreement(votes[first], votes[second], draws=draws)
            found.append({
                "kind": kind, "first": first, "second": second, "with_ties": both.with_ties,
                "comparisons": both.total_with_ties, "without_ties": both.without_ties,
                "decided": both.total_without_ties, "kappa": both.kappa, "kappa_interval": both.kappa_interval,
            })  # fmt: skip
    return found


def panel_markdown(panel: Panel) -> str:
    """Return the tables of a panel."""
    parts = [
        f"# Panel of {len(panel.judges)} judges: {plain(', '.join(panel.judges))}",
        "Means are over all judges. Where one of them gave no average, there is no mean.",
    ]
    for title, by_judge, mean, show in (
        ("Averages", "averages", "average", number), ("Win rates", "win_rates", "win_rate", percent),
    ):  # fmt: skip
        rows = [
            [entry["model"], show(entry[mean]), *(show(entry[by_judge][judge]) for judge in panel.judges)]
            for entry in panel.models
            if any(value is not None for value in entry[by_judge].values())
        ]
        if rows:
            parts += [f"## {title}", table(("model", "mean", *panel.judges), rows)]
    rows = [
        [a["kind"], a["first"], a["second"], percent(a["with_ties"]), str(a["comparisons"]), percent(a["without_ties"]),
         str(a["decided"]), number(a["kappa"])]
        for a in panel.agreement
    ]  # fmt: skip
    headings = ("judgments", "first", "second", "agree", "comparisons", "agree, without ties", "decided", "kappa")
    return "\n\n".join([*parts, "## Agreement", table(headings, rows)]) + "\n"


def write_panel(panel: Panel, folder: Path) -> str:
    """Write panel.json and panel.md, and return the text of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    text = panel_markdown(panel)
    (folder / "panel.md").write_text(text, encoding="utf-8")
    values = {"judges": panel.judges, "models": panel.models, "agreement": panel.agreement}
    (folder / "panel.json").write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return text


def judge_folder(out: Path, judge: str) -> Path:
    """Folder of one judge's own report in that of a panel."""
    return out / file_name(judge)
