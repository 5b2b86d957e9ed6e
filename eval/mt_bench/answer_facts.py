"""What a report says of answers and verdicts: how they were made and when, by which snapshot, how many were cut off."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from .store import Answer, Row

CUT_OFF = "truncated"


def answer_facts(answers: Mapping[int, Answer]) -> dict[str, Any]:
    """Return facts of one model's answer file.

    ``made``: the settings of generation that all its answers share, such as template, adapter, checkpoint and commit,
    as flat ``name: value``; ``dates``: first and last day; ``turns`` and ``truncated``: numbers of answers, counted by
    turn.
    """
    statuses = Counter(status for answer in answers.values() for status in answer.statuses)
    settings = [dict(_flat(answer.extra.get("generation") or {})) for answer in answers.values()]
    shared = settings[0] if settings else {}
    made = {name: value for name, value in shared.items() if all(other.get(name) == value for other in settings)}
    return {
        "made": made,
        "dates": dates(answer.extra for answer in answers.values()),
        "turns": sum(statuses.values()),
        "truncated": statuses[CUT_OFF],
    }


def dates(rows: Iterable[Row]) -> list[str]:
    """First and last day (UTC) of the rows' ``tstamp``; one if they are the same; empty if no row has one."""
    stamps = [row["tstamp"] for row in rows if isinstance(row.get("tstamp"), int | float)]
    days = [time.strftime("%Y-%m-%d", time.gmtime(stamp)) for stamp in stamps and (min(stamps), max(stamps))]
    return list(dict.fromkeys(days))


def truncation_notes(facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One sentence, with the remedy, for each model with answers that were cut off. ``facts``: by model."""
    return [
        f"{model}: {fact['truncated']} of {fact['turns']} answers were cut off at their token limit. Cut answers are "
        "not graded unless `judge --judge-truncated` says so. Generate them again with a higher --max-new-tokens."
        for model, fact in facts.items()
        if fact["truncated"]
    ]


def snapshots(rows: Iterable[Row]) -> dict[str, int]:
    """Number of replies by the ``model`` that the service says gave them. Replies without one are left out."""
    metas = (meta for row in rows for meta in (row["meta"] if isinstance(row.get("meta"), list) else [row.get("meta")]))
    return dict(Counter(str(meta["model"]) for meta in metas if meta and meta.get("model")))


def fingerprint_notes(provenance: Mapping[str, Any]) -> list[str]:
    """One sentence if one snapshot of the judge answered with several system fingerprints."""
    prints = [name for name in provenance["system_fingerprints"] if name]
    if len(prints) < 2 or len(provenance["judge_models_answering"]) > 1:
        return []
    return [
        f"The judge's system fingerprint changed between replies ({', '.join(prints)}): the service may have changed "
        "the model or its settings under the same name."
    ]


def snapshot_notes(rows: Iterable[Row]) -> list[str]:
    """One sentence if several snapshots of the judge answered: their verdicts are not one measurement."""
    found = snapshots(rows)
    if len(found) < 2:
        return []
    shown = ", ".join(f"{model} ({count} replies)" for model, count in found.items())
    return [
        f"Several snapshots of the judge answered: {shown}. Scores of different snapshots are not comparable: name one "
        "of them with --judge-model and judge all models again."
    ]


def head_facts(provenance: Mapping[str, Any], prices: tuple[float, float] | None) -> list[tuple[str, str]]:
    """Name and value of what the head of a report says of the judge: days, model and fingerprints, tokens, dollars."""
    prompt, completion = provenance["prompt_tokens"], provenance["completion_tokens"]
    facts = [
        ("judged on", " to ".join(provenance["judged on"]) or "a day that is not stated"),
        ("answered by", ", ".join(filter(None, provenance["judge_models_answering"])) or "a model that is not stated"),
        ("fingerprints", ", ".join(filter(None, provenance["system_fingerprints"]))),
        ("tokens", f"{prompt:,} in prompts, {completion:,} in replies"),
    ]
    if prices is not None:
        dollars = (prompt * prices[0] + completion * prices[1]) / 1e6
        facts.append(("cost", f"{dollars:.2f} dollars for the replies in these files"))
    return [(name, value) for name, value in facts if value]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None and value != "" and value != []:
            yield f"{prefix}{name}", value
