"""The report as Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .report import Report

HEADINGS = (
    "model",
    "turn 1",
    "turn 2",
    "average (pooled)",
    "95 % interval",
    "average of turns",
    "failures as 1",
    "length",
)


def to_markdown(report: Report) -> str:
    """Return all tables of a report as one string."""
    limit = report["options"]["max_failure_rate"]
    parts = [
        f"# {plain(report['title'])}: judged by {plain(report['judge'])}",
        f"{plain(report['score_name'])}. Beside each number: graded/unparsed/failed. No average is given where more "
        f"than {limit:.0%} were not graded, no mean of a category where more than "
        f"{report['options']['max_cell_failure_rate']:.0%} were not. Intervals: bootstrap over questions.",
    ]
    parts.append("; ".join(f"{name} {plain(value)}" for name, value in report["head"]) + ".")
    if report["notes"]:
        parts.append("\n".join(f"* {plain(note)}" for note in report["notes"]))
    if "single" in report:
        parts += _single(report["single"])
    if "pair" in report:
        parts += _pair(report["pair"])
    if report["problems"]:
        rows = [[reason, str(count)] for reason, count in report["problems"].items()]
        parts += ["## What was not graded, and why", table(("reason", "verdicts"), rows)]
    rows = [
        [model, "; ".join(f"{k} {v}" for k, v in answers_head(facts))] for model, facts in report["answers"].items()
    ]
    if rows:
        parts += ["## What answered", table(("model", "how its answers were made"), rows)]
    rows = [[name, str(value)] for name, value in report["provenance"].items()]
    parts += ["## Where the numbers come from", table(("what", "value"), rows)]
    return "\n\n".join(parts) + "\n"


def _single(part: Report) -> list[str]:
    rows = []
    for entry in part["models"]:
        pooled = entry["average_pooled"]
        rows.append([
            entry["model"], with_counts(entry["turn_1"]), with_counts(entry["turn_2"]), with_counts(pooled),
            interval(pooled["interval"]), number(entry["average_of_turns"]),
            number(entry["pooled_if_failures_scored_1"]), number(entry["length"].get("mean_characters"), 0),
        ])  # fmt: skip
    sections = ["## Scores", table(HEADINGS, rows)]
    if part["parsers_differ"] is not None:
        sections.append(f"The strict and the FastChat-compatible parser differ on {part['parsers_differ']} verdicts.")
    spreads = [f"{e['model']} {e['repeat_spread']:.2f}" for e in part["models"] if e["repeat_spread"] is not None]
    if spreads:
        sections.append(f"Standard deviation of a verdict over its repeats: {', '.join(spreads)}.")
    names = list(dict.fromkeys(name for entry in part["models"] for name in entry["categories"]))
    rows = [
        [entry["model"], turn.replace("_", " "), *(with_counts(entry["categories"][name][turn]) for name in names)]
        for entry in part["models"]
        for turn in ("turn_1", "turn_2", "both")
    ]
    sections += ["## Category and turn", table(("model", "turn", *names), rows)]
    if part["differences"]:
        rows = [
            [d["first"], d["second"], f"{d['mean']:+.2f}", interval((d["low"], d["high"])), f"{d['p_value']:.4f}",
             f"{d['p_holm']:.4f}", str(d["questions"])]
            for d in part["differences"]
        ]  # fmt: skip
        headings = ("first", "second", "first - second", "95 % interval", "p (permutation)", "p (Holm)", "questions")
        sections += ["## Differences on the same questions", table(headings, rows)]
    return sections


def _pair(part: Report) -> list[str]:
    rows = [
        [m["model"], str(m["win"]), str(m["loss"]), str(m["tie"]), percent(m["win_rate_adjusted"]),
         interval(m["interval"], percent), percent(m["orders_disagree"]) + (" (!)" if m["unstable"] else "")]
        for m in part["models"]
    ]  # fmt: skip
    against = f" against {part['baseline']}" if part["baseline"] else ""
    sections = [
        f"## Comparisons{against}",
        table(("model", "win", "loss", "tie", "win rate (tie = 1/2)", "95 % interval", "orders disagree"), rows),
        f"{part['matches']} comparisons in both orders, {part['errors']} without a verdict. The two orders disagree in "
        f"{percent(part['flip_rate'])}; the answer shown first wins {percent(part['first_shown_rate'])} of the decided "
        "games.",
    ]
    if any(m["unstable"] for m in part["models"]):
        sections.append(f"(!) {UNSTABLE_NOTE}")
    names = list(part["categories"])
    rows = [[m["model"], *(won(part["categories"][name].get(m["model"])) for name in names)] for m in part["models"]]
    sections.append(table(("win rate (win/loss/tie)", *names), rows))
    if len(part["head_to_head"]) > 1:
        rows = [[h["first"], h["second"], str(h["win"]), str(h["loss"]), str(h["tie"])] for h in part["head_to_head"]]
        sections.append(table(("first", "second", "first wins", "second wins", "tie"), rows))
    style = part["style_control"]
    if isinstance(style, str):
        sections.append(f"Style control: {style}.")
    else:
        rows = [
            [model, f"{style['ratings'][model]:+.0f}", f"{rating:+.0f}"]
            for model, rating in sorted(style["controlled"].items(), key=lambda item: -item[1])
        ]
        weights = ", ".join(f"{name} {weight:+.2f}" for name, weight in style["weights"].items())
        sections += [table(("model", "rating", "rating with style held equal"), rows), f"{STYLE_NOTE} {weights}."]
    ratings = part["bradley_terry"]
    if isinstance(ratings, str):
        return [*sections, f"Bradley-Terry: {ratings}."]
    rows = [
        [model, f"{rating:+.0f}", interval(part["bradley_terry_intervals"].get(model), lambda x: number(x, 0))]
        for model, rating in sorted(ratings.items(), key=lambda item: -item[1])
    ]
    return [*sections, table(("model", "Bradley-Terry rating", "95 % interval"), rows)]


STYLE_NOTE = (
    "What the judge rewards whatever the answers say (log odds for one standard deviation of the relative difference):"
)
UNSTABLE_NOTE = "In more than a third of these comparisons the verdict depends on which answer is shown first."


def won(counts: Report | None) -> str:
    """Win rate of one model in one category, with its counts."""
    if counts is None:
        return ""
    return f"{percent(counts['win_rate_adjusted'])} ({counts['win']}/{counts['loss']}/{counts['tie']})"


def answers_head(facts: Report) -> list[tuple[str, str]]:
    """Name and value of what a report says of one model's answers."""
    return [("on", " to ".join(facts["dates"])), *((name, str(value)) for name, value in facts["made"].items())]


def plain(text: object) -> str:
    """Text of models, judges and servers, so that Markdown readers show it and neither run nor link it."""
    return str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("](", "]\\(")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        "| " + " | ".join(plain(c).replace("|", "\\|").replace("\n", " ") for c in line) + " |" for line in lines
    )


def number(value: float | None, digits: int = 2) -> str:
    return "not given" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "not given" if value is None else f"{value:.1%}"


def interval(bounds: Sequence[float] | None, show: Any = number) -> str:
    return "" if bounds is None else f"{show(bounds[0])} to {show(bounds[1])}"


def with_counts(part: Report) -> str:
    return f"{number(part['mean'])} ({part['graded']}/{part['unparsed']}/{part['failed']})"
