"""The report as one self-contained HTML page: tables, both pictures, and every verdict.

All texts of models and judges are escaped, so that an answer is shown and never executed.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from . import markdown, plots
from .report import Report
from .store import Layout, load_answers, read_rows


def to_html(report: Report, cases: list[dict[str, Any]]) -> str:
    """Render the page. ``cases`` come from :func:`collect_cases`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters.update(
        number=markdown.number,
        percent=markdown.percent,
        interval=markdown.interval,
        shade=shade,
        signed=_signed,
        won=markdown.won,
        head=markdown.answers_head,
    )
    pictures = {}
    if "single" in report:
        pictures = {
            "radar": _inline(plots.to_svg(plots.radar(report))),
            "bars": _inline(plots.to_svg(plots.bars(report))),
        }
    notes = {"unstable": markdown.UNSTABLE_NOTE, "style": markdown.STYLE_NOTE}
    return environment.get_template("report.html.j2").render(
        r=report, cases=cases, ranked=by_spread(cases), pictures=pictures, texts=notes
    )


def _inline(svg: str) -> Markup:
    """Return the <svg> element alone. matplotlib has escaped its texts."""
    return Markup(svg[svg.index("<svg") :])


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def shade(mean: float | None) -> str:
    """Return the background style of a score cell, from pale at 1 to deeper at 10. The number stays readable."""
    if mean is None:
        return "background:#f3f3f3;color:#777"
    share = min(max((mean - 1.0) / 9.0, 0.0), 1.0)
    return f"background:rgba(0,114,178,{0.04 + 0.34 * share:.2f})"


def collect_cases(layout: Layout, report: Report, references: str, questions: dict[int, Any]) -> list[dict[str, Any]]:
    """Collect for each judged question its turns, and for each model the answers and single verdicts."""
    models = [entry["model"] for entry in report.get("single", {}).get("models", [])]
    comparisons = _comparisons(layout, report, references)
    models += sorted({m for rows in comparisons.values() for row in rows for m in row["models"]} - set(models))
    answers = {m: load_answers(layout.answers(m)) for m in models if layout.answers(m).is_file()}
    verdicts: dict[int, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    single = layout.judgments(report["judge"], "single", references)
    for row in read_rows(single) if "single" in report else ():
        if row["model"] in models:
            row = {"repeat": 0, "reason": "", "judgment": "", **row}  # FastChat's own files lack these
            verdicts[row["question_id"]][row["model"]].append(row)
    cases = []
    for number in sorted({*verdicts, *comparisons}):
        question = questions.get(number)
        entries = []
        for model in models:
            rows = sorted(verdicts[number].get(model, []), key=lambda r: (r["turn"], r["repeat"]))
            answer = answers.get(model, {}).get(number)
            turns = list(zip(answer.turns, answer.statuses, strict=True)) if answer else []
            entries.append({"model": model, "rows": rows, "turns": turns, "mean": _mean(rows)})
        means = [entry["mean"] for entry in entries if entry["mean"] is not None]
        cases.append({
            "id": number,
            "category": question.category if question else "unknown",
            "turns": question.turns if question else (),
            "entries": entries,
            "spread": max(means) - min(means) if len(means) > 1 else None,
            "comparisons": comparisons.get(number, []),
        })  # fmt: skip
    return cases


def by_spread(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The cases that several models have scores for, the ones that tell them apart most first."""
    return sorted((case for case in cases if case["spread"] is not None), key=lambda case: -case["spread"])


def _mean(rows: list[Any]) -> float | None:
    """Mean of the graded verdicts of one model on one question."""
    scores = [row["score"] for row in rows if row["score"] != -1]
    return sum(scores) / len(scores) if scores else None


def _comparisons(layout: Layout, report: Report, references: str) -> dict[int, list[dict[str, Any]]]:
    """Comparisons by question: the two models, the turn, and for each order who was shown first, who won, and why."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    if "pair" not in report:
        return found
    shown = {entry["model"] for entry in report["pair"]["models"]} | {report["pair"]["baseline"]}
    for row in read_rows(layout.judgments(report["judge"], "pair", references)):
        sides = (row["model_1"], row["model_2"])
        if not set(sides) <= shown:
            continue
        games = [
            {
                "first": first,
                "winner": {"model_1": sides[0], "model_2": sides[1]}.get(row[f"{game}_winner"], row[f"{game}_winner"]),
                "judgment": row.get(f"{game}_judgment", ""),
            }
            for game, first in (("g1", sides[0]), ("g2", sides[1]))
        ]
        winners = {game["winner"] for game in games}
        verdict = winners.pop() if len(winners) == 1 else "error" if "error" in winners else "tie (orders disagree)"
        found[row["question_id"]].append({"models": sides, "turn": row["turn"], "verdict": verdict, "games": games})
    return found
