"""Collect answers: one fsynced line per answer, found again by the next run, merged into the answer file at the end.

Each process appends to its own file, ``.<model>.<global rank>.part`` beside the answer file. The answer file, sorted by
question, appears only when every question is answered, so that no half-finished file is judged.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from .reply import may_think, split_thought
from .store import ANSWER_STATUSES, Row, answer_status, write_answers


@dataclass(frozen=True)
class TurnResult:
    """Result of one turn. ``reason`` says why ``status`` is not ok.

    ``thought`` is kept apart: it is no part of the conversation. ``cleaned`` counts characters that were replaced.
    """

    text: str
    status: str = "ok"
    reason: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    thought: str = ""
    thought_tokens: int | None = None
    cleaned: int = 0

    def __post_init__(self) -> None:
        assert self.status in ANSWER_STATUSES, self.status


def no_first_answer(first: TurnResult) -> TurnResult | None:
    """Return a failed second turn if the first turn gave no answer to continue from, else None."""
    if first.status in ("ok", "truncated"):
        return None
    return TurnResult("", "failed", f"turn 1 is {first.status}")


def prompt_too_long(size: int, window: int | None) -> TurnResult:
    """Return a failed result: a prompt of ``size`` tokens leaves no room for an answer in the context window."""
    return TurnResult("", "failed", f"the prompt has {size} tokens, the model's window {window}", size, 0)


def with_thought_apart(result: TurnResult) -> TurnResult:
    """Return a local model's result with its thought apart. One that ends within its thought has failed.

    How many of the tokens are thought is not counted: the text alone does not tell.
    """
    if not may_think(result.text):
        return result
    text, thought, closed = split_thought(result.text)
    if not thought:
        return result
    made = replace(result, text=text, thought=thought)
    if closed and text:
        return made
    return replace(made, status="failed", reason=f"only a thought; {result.reason or 'no answer after it'}")


def with_text_status(result: TurnResult) -> TurnResult:
    """Return the result, marked empty or failed if its text shows that it is no answer."""
    status = answer_status(result.text, result.status)
    if status == result.status:
        return result
    reason = result.reason or ("nothing but blanks" if status == "empty" else f"the text is {result.text!r}")
    return replace(result, status=status, reason=reason)


def answer_row(model: str, question_id: int, turns: Sequence[TurnResult], settings: Row) -> Row:
    """Make one row of the answer file: FastChat's keys, then ours. Only ``tstamp`` differs between equal answers."""
    identity = json.dumps([model, question_id, settings], sort_keys=True)
    apart: Row = {}
    if any(turn.thought or turn.thought_tokens for turn in turns):
        apart |= {"thoughts": [t.thought for t in turns], "thought_tokens": [t.thought_tokens for t in turns]}
    if any(turn.cleaned for turn in turns):
        apart["cleaned"] = [turn.cleaned for turn in turns]
    return {
        "question_id": question_id,
        "answer_id": hashlib.sha256(identity.encode()).hexdigest()[:22],
        "model_id": model,
        "choices": [{"index": 0, "turns": [turn.text for turn in turns]}],
        "tstamp": time.time(),
        "statuses": [turn.status for turn in turns],
        "reasons": [turn.reason for turn in turns],
        "tokens": [[turn.prompt_tokens, turn.completion_tokens] for turn in turns],
        "template": settings.get("template"),
        "generation": settings,
        **apart,
    }


class AnswerJournal:
    """Existing answers of one model, and a way to add more. Use it as a context manager.

    ``done`` holds the ids of the questions that are answered. A row that the server refused (``refused``) is none: it
    stands in the answer file, and the next run asks again.

    Raises:
        ValueError: existing answers were made with other settings, or another process is writing the same file.
    """

    def __init__(self, path: Path, settings: Row, global_rank: int = 0) -> None:
        self.path, self.settings, self.global_rank = path, settings, global_rank
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done = {row["question_id"] for row in self._rows() if not row.get("refused")}
        self._part = self._open_part(global_rank)

    def __enter__(self) -> AnswerJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._part.close()

    def add(self, row: Row) -> None:
        """Append an answer. Returns when it is on disk."""
        self._part.write(json.dumps(row).encode() + b"\n")
        self._part.flush()
        os.fsync(self._part.fileno())
        self.done.add(row["question_id"])

    def merge(self, question_ids: Iterable[int]) -> list[Row] | None:
        """If all questions are answered, by whichever process, write the answer file and delete the parts.

        Returns:
            The rows of the answer file sorted by question, or None if answers are missing. Then the parts stay.
        """
        rows = {row["question_id"]: row for row in self._rows()}
        if not set(question_ids) <= set(rows):
            return None
        write_answers(self.path, rows.values())
        for part in _parts(self.path):
            part.unlink()
        return [rows[number] for number in sorted(rows)]

    def _rows(self) -> list[Row]:
        """Read all answers, those of the answer file first. Incomplete and damaged lines are skipped."""
        found = []
        for file in (self.path, *_parts(self.path)):
            for line in file.read_bytes().split(b"\n") if file.is_file() else ():
                try:
                    row = json.loads(line)
                    self._check_settings(row["generation"], file)
                except (json.JSONDecodeError, UnicodeDecodeError):
                    continue
                except KeyError:
                    raise ValueError(f"{file} was not made by this command: give another --model-id") from None
                found.append(row)
        return found

    def _check_settings(self, there: Row, file: Path) -> None:
        keys = {*there, *self.settings} - {"origin"}  # it only says where the model is from, and may be new
        names = sorted(key for key in keys if there.get(key) != self.settings.get(key))
        if not names:
            return
        detail = "; ".join(f"{key} {_short(there.get(key))}, now {_short(self.settings.get(key))}" for key in names)
        raise ValueError(
            f"{file} holds answers made with other settings ({detail}): go on with the same ones, give another "
            "--model-id, or replace them with --overwrite"
        )

    def _open_part(self, global_rank: int) -> Any:
        """Open and lock this process's part, and cut off an incomplete last line."""
        part = open(self.path.with_name(f".{self.path.stem}.{global_rank}.part"), "a+b")  # noqa: SIM115 - see __exit__
        try:
            fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            part.close()
            raise ValueError(
                f"{part.name} is being written by another run: wait for it, or give another --model-id"
            ) from None
        part.seek(0)
        part.truncate(part.read().rfind(b"\n") + 1)
        return part


def remove_answers(path: Path) -> None:
    """Delete an answer file and its parts."""
    for file in (path, *_parts(path)):
        file.unlink(missing_ok=True)


def _parts(path: Path) -> list[Path]:
    """The part files of all processes, sorted."""
    if not path.parent.is_dir():
        return []
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.[0-9]+\.part")
    return sorted(file for file in path.parent.iterdir() if pattern.fullmatch(file.name))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
