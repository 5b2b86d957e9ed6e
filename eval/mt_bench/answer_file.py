"""Answers on their way to the answer file: one fsynced line each, found again by the next run, merged at the end.

Each process appends to a file of its own, ``.<model>.<global rank>.part`` beside the answer file; the answer file
appears when every question is answered, sorted by question, so that nobody judges half of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .store import ANSWER_STATUSES, Row, answer_status, write_answers


@dataclass(frozen=True)
class TurnResult:
    """What one turn came to; ``reason`` says why a status is not ok."""

    text: str
    status: str = "ok"
    reason: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def __post_init__(self) -> None:
        assert self.status in ANSWER_STATUSES, self.status


def no_first_answer(first: TurnResult) -> TurnResult | None:
    """The second turn of a question whose first has no answer to go on from, or None."""
    if first.status in ("ok", "truncated"):
        return None
    return TurnResult("", "failed", f"turn 1 is {first.status}")


def prompt_too_long(size: int, window: int | None) -> TurnResult:
    """A prompt of ``size`` tokens that leaves no room for an answer."""
    return TurnResult("", "failed", f"the prompt has {size} tokens, the model's window {window}", size, 0)


def with_text_status(result: TurnResult) -> TurnResult:
    """The same, marked empty or failed where the text itself shows that it is no answer."""
    status = answer_status(result.text, result.status)
    if status == result.status:
        return result
    reason = result.reason or ("nothing but blanks" if status == "empty" else f"the text is {result.text!r}")
    return TurnResult(result.text, status, reason, result.prompt_tokens, result.completion_tokens)


def answer_row(model: str, question_id: int, turns: Sequence[TurnResult], settings: Row) -> Row:
    """One line of the answer file: FastChat's keys, then ours. Apart from ``tstamp`` the same for the same answer."""
    identity = json.dumps([model, question_id, settings], sort_keys=True)
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
    }


class AnswerJournal:
    """The answers of one model that exist, and the way to add more. Use as a context manager.

    Raises:
        ValueError: answers made with other settings are there, or another process writes the same file.
    """

    def __init__(self, path: Path, settings: Row, global_rank: int = 0) -> None:
        self.path, self.settings, self.global_rank = path, settings, global_rank
        path.parent.mkdir(parents=True, exist_ok=True)
        self.done = {row["question_id"] for row in self._rows()}
        self._part = self._open_part(global_rank)

    def __enter__(self) -> AnswerJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._part.close()

    def add(self, row: Row) -> None:
        """Append an answer and return when it is on the disk."""
        self._part.write(json.dumps(row).encode() + b"\n")
        self._part.flush()
        os.fsync(self._part.fileno())
        self.done.add(row["question_id"])

    def merge(self, question_ids: Iterable[int]) -> list[Row] | None:
        """Write the answer file if all questions are answered, by whichever process, and drop the parts.

        Returns:
            its rows by question, or None if answers are missing (the parts then stay).
        """
        rows = {row["question_id"]: row for row in self._rows()}
        if not set(question_ids) <= set(rows):
            return None
        write_answers(self.path, rows.values())
        for part in _parts(self.path):
            part.unlink()
        return [rows[number] for number in sorted(rows)]

    def _rows(self) -> list[Row]:
        """All answers found, the answer file's first. Torn and damaged lines count as not there."""
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
        if there == self.settings:
            return
        names = sorted(key for key in {*there, *self.settings} if there.get(key) != self.settings.get(key))
        detail = "; ".join(f"{key} {_short(there.get(key))}, now {_short(self.settings.get(key))}" for key in names)
        raise ValueError(
            f"{file} holds answers made with other settings ({detail}): go on with the same ones, give another "
            "--model-id, or replace them with --overwrite"
        )

    def _open_part(self, global_rank: int) -> Any:
        """This process's part, locked, its torn last line cut off."""
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
    """The processes' own files, sorted."""
    if not path.parent.is_dir():
        return []
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.[0-9]+\.part")
    return sorted(file for file in path.parent.iterdir() if pattern.fullmatch(file.name))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
