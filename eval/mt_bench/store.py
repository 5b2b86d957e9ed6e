"""Answer and judgment files. They have FastChat's format followed by our keys, so that FastChat's tools can read them.

Layout below one data folder (FastChat's ``data/``):
    <bench>/model_answer/<model>.jsonl
    <bench>/model_judgment/<judge>_single.jsonl, <judge>_pair.jsonl
Keys that FastChat does not have: in answers ``statuses`` (ok, empty, truncated or failed for each turn); in judgments
``status``, ``reason``, the results of both parsers, ``repeat``, ``key`` and ``meta``.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .reply import clean_text, may_think, split_thought

ANSWER_STATUSES = ("ok", "empty", "truncated", "failed")
_FAILED_TEXTS = ("ERROR", "$ERROR$")
Row = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """The turns of one answer with their statuses. ``extra`` holds the other keys of the row."""

    question_id: int
    turns: tuple[str, ...]
    statuses: tuple[str, ...]
    extra: Row = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Layout:
    """Paths of the files of one benchmark."""

    data: Path
    bench: str

    def answers(self, model: str) -> Path:
        return self.data / self.bench / "model_answer" / f"{model}.jsonl"

    def judgments(self, judge: str, kind: str, references: str = "gpt-4") -> Path:
        """Return the judgment file. Corrected references, and judge prompts of the user, have files of their own."""
        name, _, prompts = references.partition("+")
        suffix = (".corrected" if name == "corrected" else "") + (f".{prompts}" if prompts else "")
        return self.data / self.bench / "model_judgment" / f"{file_name(judge)}{suffix}_{kind}.jsonl"

    def cache(self, judge: str) -> Path:
        return self.data / self.bench / "model_judgment" / f".replies_{file_name(judge)}.jsonl"

    def models(self) -> list[str]:
        """Return the models that have an answer file, sorted as in FastChat."""
        return sorted(file.stem for file in (self.data / self.bench / "model_answer").glob("*.jsonl"))


def file_name(judge: str) -> str:
    """Make a judge's name usable in a file name (hub ids contain a slash)."""
    return re.sub(r"[^A-Za-z0-9._+-]", "--", judge)


def check_model_name(model: str) -> None:
    """Raise ValueError for names that pandas in FastChat would read as numbers, or that would leave the folder."""
    if re.fullmatch(r"[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?", model, re.IGNORECASE) or not model:
        raise ValueError(f"model name {model!r} looks like a number and would be read as one; use 'run-{model}'")
    if "/" in model or model.startswith("."):
        raise ValueError(f"model name {model!r} must be usable as a file name: no slash, no leading dot")


def read_rows(path: Path) -> Iterator[Row]:
    """Yield the JSON objects of a file, one per line.

    Raises:
        ValueError: a line is damaged (the message gives its number).
    """
    with open(path, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None


def load_answers(path: Path, keep_thoughts: bool = False) -> dict[int, Answer]:
    """Read answers by question id. Of duplicates the last one counts, as in FastChat's reorganised file.

    Thoughts that a turn begins with (``<think>...</think>``) are no part of the answer. They go to
    ``extra["thoughts"]``, one text per turn. A turn that ends within its thought has no answer.

    Args:
        keep_thoughts: leave them in the turns, and put those back that the file keeps apart.

    Raises:
        ValueError: there is no such file, or statuses and turns do not match.
    """
    if not path.is_file():
        there = sorted(file.stem for file in path.parent.glob("*.jsonl"))
        raise ValueError(f"no answers at {path}; that folder has answers of {there}")
    answers = {}
    for row in read_rows(path):
        turns = tuple(clean_text(turn)[0] for turn in row["choices"][0]["turns"])
        given = row.get("statuses") or ["ok"] * len(turns)
        unknown = sorted(set(given) - set(ANSWER_STATUSES))
        if unknown or len(given) != len(turns):
            raise ValueError(
                f"{path}, question {row['question_id']}: statuses {given} for {len(turns)} turns; each must be one "
                f"of {ANSWER_STATUSES}"
            )
        extra = {name: value for name, value in row.items() if name not in ("question_id", "choices", "statuses")}
        apart = _thoughts(row, len(turns))
        if keep_thoughts:
            turns = tuple(_with_thought(*both) for both in zip(turns, apart, strict=True))
        else:
            split = [split_thought(text) if may_think(text) else (text, "", True) for text in turns]
            turns = tuple(text for text, _, _ in split)
            found = ["\n\n".join(filter(None, both)) for both in zip(apart, (t for _, t, _ in split), strict=True)]
            extra |= {"thoughts": found} if any(found) else {}
        statuses = tuple(answer_status(text, said) for text, said in zip(turns, given, strict=True))
        answers[row["question_id"]] = Answer(row["question_id"], turns, statuses, extra)
    return answers


def _thoughts(row: Row, turns: int) -> list[str]:
    """The thoughts that an answer row keeps apart, one text per turn."""
    given = row.get("thoughts")
    if not isinstance(given, list) or len(given) != turns:
        return [""] * turns
    return [clean_text(thought)[0] if isinstance(thought, str) else "" for thought in given]


def _with_thought(text: str, thought: str) -> str:
    return f"<think>\n{thought}\n</think>\n\n{text}" if thought else text


def answer_status(text: str, said: str = "ok") -> str:
    """Return the status of one turn: the generator's, unless the text itself shows that it is no answer."""
    if said == "ok" and text.strip() in _FAILED_TEXTS:
        return "failed"
    if said in ("ok", "truncated") and not text.strip():
        return "empty"
    return said


def write_answers(path: Path, rows: Iterable[Row]) -> None:
    """Write an answer file sorted by question id (FastChat's final form). Of duplicates the last one is kept."""
    latest = {row["question_id"]: row for row in rows}
    _replace(path, (latest[number] for number in sorted(latest)))


def row_key(row: Row) -> tuple[Any, ...]:
    """Return a key that is equal for rows of the same measurement. For pairs the order of the models is irrelevant."""
    models = (row["model"],) if "model" in row else tuple(sorted((row["model_1"], row["model_2"])))
    return (row["question_id"], row["turn"], *models, *row["judge"], row.get("repeat", 0))


def merge_judgments(path: Path, new: Iterable[Row]) -> int:
    """Merge judgment rows into the file ``path``. They replace rows of the same measurements; other rows are kept.

    ``new`` is consumed one row at a time. The file is replaced atomically, so nobody sees it half written.

    Returns:
        The number of new measurements.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fresh = path.with_name(f".{path.name}.new")
        keys = set()
        with open(fresh, "w", encoding="utf-8", newline="\n") as file:
            for row in new:
                keys.add(row_key(row))
                file.write(json.dumps(row) + "\n")
        kept = (row for row in read_rows(path) if row_key(row) not in keys) if path.exists() else iter(())
        _replace(path, (row for part in (kept, read_rows(fresh)) for row in part))
        fresh.unlink()
    return len(keys)


def _replace(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
