"""The report as one HTML page that needs nothing else: tables, both pictures, and every verdict to read.

All texts of models and judges are escaped: an answer is shown, never run.
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
    """The whole page. ``cases`` come from ``collect_cases``."""
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
    """The <svg> element alone; its text was escaped by matplotlib."""
    return Markup(svg[svg.index("<svg") :])


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def shade(mean: float | None) -> str:
    """A background for a score cell, pale at 1 and deeper at 10; the number stays readable on it."""
    if mean is None:
        return "background:#f3f3f3;color:#777"
    share = min(max((mean - 1.0) / 9.0, 0.0), 1.0)
    return f"background:rgba(0,114,178,{0.04 + 0.34 * share:.2f})"


def collect_cases(layout: Layout, report: Report, references: str, questions: dict[int, Any]) -> list[dict[str, Any]]:
    """For each question its turns and, for each model, the answers and single verdicts, by category."""
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
