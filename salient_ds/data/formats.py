"""Reads and validates instruction data (JSON lists, JSONL, parquet, `datasets` names) as `Conversation`s.

Imports neither torch nor transformers nor `datasets`, because `salient-ds check` validates local files with it before
any process starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from salient_ds.data.conversation import Conversation, DataError, OnBadRow, Problem, ProblemLog, RowError, Turn
from salient_ds.data.rows import FORMATS, detect_format, parse_row
from salient_ds.data.sources import count_rows, is_local, open_source
from salient_ds.data.turns import EMPTY_ANSWER
from salient_ds.strict import nearest

__all__ = [
    "Conversation",
    "DataError",
    "FileSummary",
    "Turn",
    "check_file",
    "count_rows",
    "detect_format",
    "format_of",
    "is_local",
    "read_data",
    "read_rows",
]


@dataclass(frozen=True)
class FileSummary:
    """What a valid file holds."""

    path: str
    format: str
    rows: int
    """Usable conversations."""
    answers: int
    skipped: int
    """Rows left out on request."""
    skipped_kinds: Mapping[str, int]
    """The same by kind of problem."""
    ignored_keys: Mapping[str, int]
    """Keys that nothing reads, and in how many rows."""

    def notes(self, name: str) -> list[str]:
        """What a user should know about the file; ``name`` is its part, as in "train"."""
        notes = []
        if self.skipped:
            kinds = ", ".join(f"{count:,} x {kind}" for kind, count in self.skipped_kinds.items())
            notes.append(f"{name}: {self.skipped:,} rows are left out ({kinds})")
        if self.ignored_keys:
            keys = ", ".join(f"{key} ({count:,})" for key, count in list(self.ignored_keys.items())[:8])
            more = f" and {len(self.ignored_keys) - 8} more" if len(self.ignored_keys) > 8 else ""
            notes.append(f"{name}: keys of rows that nothing reads: {keys}{more}")
        return notes


def read_data(
    path: str | Path, fmt: str = "auto", empty_answers: OnBadRow = "error", bad_rows: OnBadRow = "error"
) -> tuple[list[Conversation], FileSummary]:
    """Reads and validates a whole file or data set.

    `path`: a JSON list, JSONL (.gz too) or parquet file, or a `datasets` name ("name", "name:config", with an optional
    "[split]"). `fmt`: one of FORMATS in rows.py, or "auto" (the first row whose keys fit a format decides).
    `empty_answers`, `bad_rows`: "error" refuses a file with such rows; "skip" leaves them out and counts them by kind
    (`empty_answers` concerns one kind alone: the published Alpaca file has some). Raises DataError that lists every
    kind of problem with its count, and ValueError for an unknown `fmt`.
    """
    reading = Reading(path, fmt, empty_answers, bad_rows)
    return list(reading.validated()), reading.summary()


def read_rows(
    path: str | Path, fmt: str = "auto", empty_answers: OnBadRow = "error", bad_rows: OnBadRow = "error"
) -> list[Conversation]:
    """As `read_data`, the conversations alone."""
    return read_data(path, fmt, empty_answers, bad_rows)[0]


def check_file(
    path: str | Path, fmt: str = "auto", empty_answers: OnBadRow = "error", bad_rows: OnBadRow = "error"
) -> FileSummary:
    """Validates every row without keeping any. Raises as `read_data`."""
    reading = Reading(path, fmt, empty_answers, bad_rows)
    for _ in reading.validated():
        pass
    return reading.summary()


def format_of(path: str | Path, fmt: str = "auto") -> str | None:
    """The format of a source: ``fmt``, or that of the first row that fits one. None if no row does."""
    if fmt != "auto":
        return fmt
    reading = Reading(path, fmt, "skip", "skip")
    try:
        next(reading.validated(), None)
    except DataError:
        return None
    return reading.format


class Reading:
    """One pass over one source. It counts rows, and knows the format once a row has shown it."""

    def __init__(self, path: str | Path, fmt: str, empty_answers: OnBadRow, bad_rows: OnBadRow) -> None:
        if fmt not in ("auto", *FORMATS):
            near = nearest(fmt, ("auto", *FORMATS))
            hint = f'; did you mean "{near}"?' if near else ""
            raise ValueError(f'unknown data format "{fmt}": known are auto, {", ".join(FORMATS)}{hint}')
        for name, value in (("empty_answers", empty_answers), ("bad_rows", bad_rows)):
            if value not in ("error", "skip"):
                raise ValueError(f'{name}="{value}": must be "error" or "skip"')
        self.path = str(path)
        self.container = open_source(path)
        self.format = None if fmt == "auto" else fmt
        self.empty_answers, self.bad_rows = empty_answers, bad_rows
        self.good = self.answers = 0
        self.skipped: Counter[str] = Counter()
        self.ignored: Counter[str] = Counter()

    def validated(self) -> Iterator[Conversation]:
        """Every conversation; problems that are not skipped are collected and raised together at the end."""
        log = ProblemLog(self.container.name, self.container.unit)
        for line, row in self.container.rows():
            outcome = row if isinstance(row, Problem) else self._parse(row, line)
            if isinstance(outcome, Conversation):
                self.good += 1
                self.answers += len(outcome.answers)
                yield outcome
            elif self.bad_rows == "skip" or (outcome.kind == EMPTY_ANSWER and self.empty_answers == "skip"):
                self.skipped[outcome.kind] += 1
            else:
                log.add(outcome)
        log.raise_if_any()
        if not self.good:
            left_out = sum(self.skipped.values())
            kinds = ", ".join(self.skipped)
            why = f": all {left_out} rows are left out ({kinds})" if left_out else " to train on"
            raise DataError(self.container.name, [Problem("empty", 0, f"there are no rows{why}")])

    def summary(self) -> FileSummary:
        """What has been read."""
        assert self.format is not None, "a file with valid rows has a format"
        skipped, ignored = dict(self.skipped.most_common()), dict(self.ignored.most_common())
        return FileSummary(
            path=self.path,
            format=self.format,
            rows=self.good,
            answers=self.answers,
            skipped=sum(self.skipped.values()),
            skipped_kinds=skipped,
            ignored_keys=ignored,
        )

    def _parse(self, row: object, line: int) -> Conversation | Problem:
        try:
            if self.format is None and isinstance(row, dict):
                self.format = detect_format(row)
            parsed = parse_row(
                row, self.format or "alpaca", (self.container.name, line), self.container.nulls, self.container.unit
            )
        except RowError as error:
            return Problem(error.kind, line, f"{error}{self._other_format(row)}{_remedy(error)}")
        self.ignored.update(parsed.ignored)
        return parsed.conversation

    def _other_format(self, row: object) -> str:
        """A note for a row that belongs to another format than the file."""
        try:
            other = detect_format(row) if isinstance(row, dict) and self.format else self.format
        except RowError:
            return ""
        return f" (this row looks like {other}, the file is read as {self.format})" if other != self.format else ""


def _remedy(error: RowError) -> str:
    return '; fill it in, or set empty_answers to "skip"' if error.kind == EMPTY_ANSWER else ""
