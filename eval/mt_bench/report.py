"""Build a report from judgment files: numbers with their counts, intervals and origin, as a plain dict.

Every average comes with the number of verdicts that were graded, unparsed and failed. It is left out (None) if the
fraction of verdicts that are not graded exceeds a limit: a low one for averages over all questions, a high one for a
category, because one missing verdict of ten is no reason to hide the other nine.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from . import statistics
from .answer_facts import (
    answer_facts,
    dates,
    fingerprint_notes,
    head_facts,
    snapshot_notes,
    truncation_notes,
)
from .pair_report import pair_part
from .questions import CATEGORIES
from .report_options import ReportOptions
from .statistics import ScoreTable
from .store import Answer, Layout, Row, load_answers, read_rows

Report = dict[str, Any]


def build_report(layout: Layout, judge: str, references: str, options: ReportOptions) -> Report:
    """Build the report of one judge from its single and its pair file, whichever exist.

    Raises:
        ValueError: there are no judgments, or they were made in different ways.
    """
    files = {kind: layout.judgments(judge, kind, references) for kind in ("single", "pair")}
    rows = {kind: list(_slim(read_rows(file), options.models)) for kind, file in files.items() if file.is_file()}
    if not any(rows.values()):
        there = sorted(file.name for file in next(iter(files.values())).parent.glob("*.jsonl"))
        raise ValueError(f"no judgments of {judge!r} at {files['single']}; that folder has {there}")
    every = [row for part in rows.values() for row in part]
    _refuse_mixed(every)
    models = sorted({row[name] for row in every for name in ("model", "model_1", "model_2") if name in row})
    answers = {m: load_answers(layout.answers(m)) for m in models if layout.answers(m).is_file()}
    report: Report = {
        "bench": layout.bench,
        "title": "MT-Bench" if layout.bench == "mt_bench" else f"{layout.bench} (not MT-Bench)",
        "score_name": _score_name(layout.bench, references),
        "judge": judge,
        "options": {
            "max_failure_rate": options.max_failure_rate,
            "max_cell_failure_rate": options.max_cell_failure_rate,
            "draws": options.draws,
        },
        "provenance": provenance(every),
        "problems": dict(Counter(r["reason"] for r in every if r.get("reason")).most_common()),
    }
    templates = {model: _template(given) for model, given in answers.items()}
    report["provenance"]["templates"] = {model: name or "not stated" for model, name in templates.items()}
    report["head"] = head_facts(report["provenance"], options.prices)
    report["answers"] = {model: answer_facts(given) for model, given in answers.items()}
    report["notes"] = (
        snapshot_notes(every) + fingerprint_notes(report["provenance"]) + truncation_notes(report["answers"])
    )
    if options.one_snapshot and (moved := snapshot_notes(every)):
        raise ValueError(f"{moved[0]} (--one-snapshot)")
    if rows.get("single"):
        report["single"] = single_part(rows["single"], answers, options)
        report["notes"] += pairing_notes(report["single"])
    if rows.get("pair"):
        report["pair"] = pair_part(rows["pair"], answers, options)
    return report


def _slim(rows: Iterable[Row], models: Sequence[str]) -> Iterable[Row]:
    """Yield the rows of the wanted models, without their long texts."""
    texts = ("user_prompt", "judgment", "g1_user_prompt", "g1_judgment", "g2_user_prompt", "g2_judgment")
    for row in rows:
        if not models or {row[n] for n in ("model", "model_1", "model_2") if n in row} <= set(models):
            yield {name: value for name, value in row.items() if name not in texts}


def _refuse_mixed(rows: Sequence[Row]) -> None:
    """Raise ValueError if rows differ in parser, references, file hashes or endpoint: one table must not mix them."""
    for name in ("parser", "references", "sha256", "endpoint"):
        kinds = {json.dumps(row[name], sort_keys=True) for row in rows if name in row}
        if len(kinds) > 1:
            raise ValueError(
                f"the judgments were made with different {name}: {sorted(kinds)}; judge all models again in the same "
                "way, or choose some with --model"
            )


def _score_name(bench: str, references: str) -> str:
    if bench != "mt_bench":
        return "score on our own questions" if bench == "salient_own" else f"score on {bench}"
    if "+" in references:
        return "score on MT-Bench's questions with other judge prompts (not comparable with published scores)"
    if references == "corrected":
        return "MT-Bench score with corrected references (not comparable with published scores)"
    return "MT-Bench score"


def provenance(rows: Sequence[Row]) -> dict[str, Any]:
    """Return which judge answered, with which settings and files, and how many tokens it used."""
    metas = [m for r in rows for m in (r["meta"] if isinstance(r.get("meta"), list) else [r.get("meta")]) if m]
    first = next((row for row in rows if "endpoint" in row), {})
    return {
        "judged on": dates(rows),
        "judge_models_answering": dict(Counter(m.get("model", "") for m in metas)),
        "system_fingerprints": dict(Counter(m.get("system_fingerprint", "") for m in metas)),
        "finish_reasons": dict(Counter(m.get("finish_reason", "") for m in metas)),
        "endpoint": first.get("endpoint", {}),
        "parser": first.get("parser", "as in the file"),
        "references": first.get("references", "not stated"),
        "sha256": first.get("sha256", {}),
        "prompts": sorted({row["judge"][1] for row in rows}),
        "prompt_tokens": sum(m.get("prompt_tokens") or 0 for m in metas),
        "completion_tokens": sum(m.get("completion_tokens") or 0 for m in metas),
        "attempts": sum(m.get("attempts", 1) for m in metas),
    }


def single_part(rows: Sequence[Row], answers: Mapping[str, Mapping[int, Answer]], options: ReportOptions) -> Report:
    """Report single grading: one entry per model, best first, and the differences between models."""
    tables = statistics.score_tables(rows, options.categories)
    models = [_model_entry(table, rows, answers.get(name), options) for name, table in tables.items()]
    models.sort(key=lambda entry: -(entry["average_pooled"]["mean"] or -1.0))
    shown = {e["model"]: tables[e["model"]] for e in models if e["average_pooled"]["mean"] is not None}
    differences = [asdict(d) for d in statistics.paired_differences(shown, options.draws)]
    return {"models": models, "differences": differences, "parsers_differ": _parsers_differ(rows)}


def pairing_notes(part: Report) -> list[str]:
    """Say which questions were paired, where a difference of averages is not that of the paired questions."""
    averages = {entry["model"]: entry["average_pooled"]["mean"] for entry in part["models"]}
    notes = []
    for d in part["differences"]:
        first, second = averages[d["first"]], averages[d["second"]]
        if abs(first - second - d["mean"]) >= 0.02:
            notes.append(
                f"{d['first']} and {d['second']}: their averages, {first:.2f} and {second:.2f} over all graded answers "
                f"of each, differ by {first - second:+.2f}. The paired difference, {d['mean']:+.2f}, is over the "
                f"{d['answers']} answers ({d['questions']} questions) that are graded for both, averaged by "
                f"question first. Over these answers the two have {d['first_mean']:.2f} and {d['second_mean']:.2f}."
            )
    return notes


def _parsers_differ(rows: Sequence[Row]) -> int | None:
    """Count the verdicts on which the two parsers differ. None for files that hold one reading only."""
    both = [(row["score_strict"], row["score_fastchat"]) for row in rows if "score_strict" in row]
    return sum(a != b for a, b in both) if both else None


def _model_entry(
    table: ScoreTable, rows: Sequence[Row], answers: Mapping[int, Answer] | None, options: ReportOptions
) -> Report:
    own = [row for row in rows if row["model"] == table.model]
    pooled = cell(table, own, options)
    shown = pooled["mean"] is not None
    scores_QT = table.scores_QT
    interval = statistics.bootstrap_interval(scores_QT, table.categories, options.draws) if shown else None
    return {
        "model": table.model,
        "turn_1": cell(table, own, options, turn=1),
        "turn_2": cell(table, own, options, turn=2),
        "average_pooled": {**pooled, "interval": interval},
        "average_of_turns": statistics.mean_of_turns(scores_QT) if shown else None,
        "standard_error": statistics.clustered_standard_error(scores_QT) if shown else None,
        "pooled_if_failures_scored_1": statistics.pooled_with_failures_as_lowest(scores_QT),
        "repeat_spread": table.repeat_spread,
        "categories": {
            name: {
                "both": cell(table, own, options, name),
                "turn_1": cell(table, own, options, name, 1),
                "turn_2": cell(table, own, options, name, 2),
            }
            for name in dict.fromkeys((*CATEGORIES, *table.categories))
            if name in table.categories
        },
        "length": _lengths(table, answers),
        "template": _template(answers),
    }


def cell(
    table: ScoreTable, rows: Sequence[Row], options: ReportOptions, category: str | None = None, turn: int | None = None
) -> Report:
    """Compute one mean score of a model with its counts of verdicts. Above the failure limit the mean is None.

    Args:
        rows: the model's judgment rows.
        category, turn: restrict the rows; None: all.
    """
    names = dict(zip(table.question_ids, table.categories, strict=True))
    counts: Counter[str] = Counter()
    for row in rows:
        if category in (None, names[row["question_id"]]) and turn in (None, row["turn"]):
            counts[row.get("status") or ("graded" if row["score"] != -1 else "unparsed")] += 1
    total = sum(counts.values())
    scores = table.select(category, turn)
    # The small margin absorbs rounding errors, so that 1 of 20 does not count as more than 5 %.
    limit = options.max_failure_rate if category is None and turn is None else options.max_cell_failure_rate
    missing_allowed = limit * total + 1e-9
    mean = statistics.mean_or_none(scores) if total - counts["graded"] <= missing_allowed else None
    return {"mean": mean, **{name: counts[name] for name in ("graded", "unparsed", "failed")}}


def _lengths(table: ScoreTable, answers: Mapping[int, Answer] | None) -> Report:
    """Return the lengths of the graded answers in characters, and their correlation with the score."""
    if answers is None:
        return {}
    lengths, scores = [], []
    for place, question in enumerate(table.question_ids):
        for turn, score in enumerate(table.scores_QT[place]):
            if not np.isnan(score) and question in answers:
                lengths.append(len(answers[question].turns[turn]))
                scores.append(float(score))
    return statistics.length_statistics(lengths, scores)


def _template(answers: Mapping[int, Answer] | None) -> str | None:
    """Return the chat template named in the answer file, or None."""
    names = {str(a.extra["template"]) for a in (answers or {}).values() if a.extra.get("template")}
    return ", ".join(sorted(names)) or None


def write_json(report: Report, path: Path) -> None:
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
