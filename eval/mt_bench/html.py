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
        number=markdown.number, percent=markdown.percent, interval=markdown.interval, shade=shade, signed=_signed
    )
    pictures = {}
    if "single" in report:
        pictures = {
            "radar": _inline(plots.to_svg(plots.radar(report))),
            "bars": _inline(plots.to_svg(plots.bars(report))),
        }
    return environment.get_template("report.html.j2").render(r=report, cases=cases, pictures=pictures)


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
    if "single" not in report:
        return []
    models = [entry["model"] for entry in report["single"]["models"]]
    answers = {m: load_answers(layout.answers(m)) for m in models if layout.answers(m).is_file()}
    verdicts: dict[int, dict[str, list[Any]]] = defaultdict(lambda: defaultdict(list))
    for row in read_rows(layout.judgments(report["judge"], "single", references)):
        if row["model"] in models:
            row = {"repeat": 0, "reason": "", **row}  # FastChat's own files lack these
            verdicts[row["question_id"]][row["model"]].append(row)
    cases = []
    for number in sorted(verdicts):
        question = questions.get(number)
        entries = []
        for model in models:
            rows = sorted(verdicts[number].get(model, []), key=lambda r: (r["turn"], r["repeat"]))
            answer = answers.get(model, {}).get(number)
            turns = list(zip(answer.turns, answer.statuses, strict=True)) if answer else []
            entries.append({"model": model, "rows": rows, "turns": turns})
        cases.append({
            "id": number,
            "category": question.category if question else "unknown",
            "turns": question.turns if question else (),
            "entries": entries,
        })  # fmt: skip
    return cases
