"""Reads and validates instruction data (JSON lists, JSONL, parquet, `datasets` names) as `Conversation`s.

Imports neither torch nor transformers nor `datasets`, because `salient-ds check` validates local files with it before
any process starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from salient_ds.data.conversation import Conversation, DataError, Problem, ProblemLog, Turn
from salient_ds.data.json_files import count_lines, is_json_list, jsonl_rows, list_rows
from salient_ds.data.remote import HubName, count_parquet, hub_rows, parquet_rows, parse_hub_name
from salient_ds.data.rows import EMPTY_ANSWER, FORMATS, RowError, detect_format, parse_row
from salient_ds.strict import nearest

__all__ = [
    "Conversation",
    "DataError",
    "FileSummary",
    "Turn",
    "check_file",
    "count_rows",
    "detect_format",
    "is_local",
    "read_rows",
]

EmptyAnswers = Literal["error", "skip"]
_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet")


@dataclass(frozen=True)
class FileSummary:
    """What a valid file holds: usable conversations (`rows`), the answers in them, and skipped rows (empty answer)."""

    path: str
    format: str
    rows: int
    answers: int
    skipped: int


class _Container(NamedTuple):
    """A source of rows. `unit` is what messages call a row's number: "line" or "row"."""

    name: str
    unit: str
    rows: Callable[[], Iterator[tuple[int, object | Problem]]]


def is_local(path: str | Path) -> bool:
    """Whether `path` is a local file, rather than a data set to load by name. Raises DataError for a missing file."""
    return not isinstance(_locate(path), HubName)


def read_rows(path: str | Path, fmt: str = "auto", empty_answers: EmptyAnswers = "error") -> list[Conversation]:
    """Reads and validates a whole file or data set.

    `path`: a JSON list, JSONL or parquet file, or a `datasets` name ("name", "name:config", with an optional
    "[split]"). `fmt`: "alpaca", "messages", "sharegpt", or "auto" (the first row whose keys fit a format decides).
    `empty_answers`: "error" refuses a file with empty answers; "skip" leaves these rows out (the published Alpaca file
    has some). Raises DataError that lists every kind of problem with its count, and ValueError for an unknown `fmt`.
    """
    return _Reading(path, fmt, empty_answers).conversations()


def check_file(path: str | Path, fmt: str = "auto", empty_answers: EmptyAnswers = "error") -> FileSummary:
    """Validates every row without keeping any. Raises as `read_rows`."""
    reading = _Reading(path, fmt, empty_answers)
    answers = sum(len(conversation.answers) for conversation in reading.validated())
    assert reading.format is not None, "a file with valid rows has a format"
    return FileSummary(str(path), reading.format, reading.good, answers, reading.skipped)


def count_rows(path: str | Path) -> int:
    """Number of rows of a local file, without validation. It counts lines, or reads the parquet footer.

    Raises DataError for a missing or empty file, and for a `datasets` name (which would have to be downloaded).
    """
    located = _locate(path)
    if isinstance(located, HubName):
        raise DataError.of(
            str(path),
            "not local",
            "a data set loaded by name cannot be counted before it is downloaded",
        )
    if _is_parquet(located):
        return count_parquet(located)
    if is_json_list(located):
        return sum(1 for _ in list_rows(located))
    return count_lines(located)


class _Reading:
    """One pass over one source. It counts rows, and knows the format once a row has shown it."""

    def __init__(self, path: str | Path, fmt: str, empty_answers: EmptyAnswers) -> None:
        if fmt not in ("auto", *FORMATS):
            near = nearest(fmt, ("auto", *FORMATS))
            hint = f'; did you mean "{near}"?' if near else ""
            raise ValueError(f'unknown data format "{fmt}": known are auto, {", ".join(FORMATS)}{hint}')
        if empty_answers not in ("error", "skip"):
            raise ValueError(f'empty_answers="{empty_answers}": must be "error" or "skip"')
        self.container = _open(path)
        self.format = None if fmt == "auto" else fmt
        self.empty_answers = empty_answers
        self.good = self.skipped = 0

    def outcomes(self) -> Iterator[Conversation | Problem]:
        """One conversation or problem per row, rows skipped on request left out."""
        for line, row in self.container.rows():
            outcome = row if isinstance(row, Problem) else self._parse(row, line)
            if isinstance(outcome, Problem) and outcome.kind == EMPTY_ANSWER and self.empty_answers == "skip":
                self.skipped += 1
                continue
            self.good += isinstance(outcome, Conversation)
            yield outcome

    def validated(self) -> Iterator[Conversation]:
        """Every conversation; problems are collected and raised together at the end."""
        log = ProblemLog(self.container.name, self.container.unit)
        for outcome in self.outcomes():
            if isinstance(outcome, Problem):
                log.add(outcome)
            else:
                yield outcome
        log.raise_if_any()
        self.require_rows()

    def conversations(self) -> list[Conversation]:
        return list(self.validated())

    def require_rows(self) -> None:
        if self.good:
            return
        why = f": all {self.skipped} rows have an empty answer" if self.skipped else " to train on"
        raise DataError(self.container.name, [Problem("empty", 0, f"there are no rows{why}")])

    def _parse(self, row: object, line: int) -> Conversation | Problem:
        try:
            if self.format is None and isinstance(row, dict):
                self.format = detect_format(row)
            return parse_row(row, self.format or "alpaca", (self.container.name, line))
        except RowError as error:
            return Problem(error.kind, line, f"{error}{self._other_format(row)}{_remedy(error)}")

    def _other_format(self, row: object) -> str:
        """A note for a row that belongs to another format than the file."""
        try:
            other = detect_format(row) if isinstance(row, dict) and self.format else self.format
        except RowError:
            return ""
        return f" (this row looks like {other}, the file is read as {self.format})" if other != self.format else ""


def _remedy(error: RowError) -> str:
    return '; fill it in, or set empty_answers to "skip"' if error.kind == EMPTY_ANSWER else ""


def _open(path: str | Path) -> _Container:
    located = _locate(path)
    if isinstance(located, HubName):
        return _Container(str(path), "row", lambda: hub_rows(str(path), located))
    if _is_parquet(located):
        return _Container(str(path), "row", lambda: parquet_rows(located))
    if is_json_list(located):
        return _Container(str(path), "line", lambda: list_rows(located))
    return _Container(str(path), "line", lambda: jsonl_rows(located))


def _locate(path: str | Path) -> Path | HubName:
    """A local file that exists, or a data set name. Raises DataError for a missing file."""
    local = Path(path).expanduser()
    if local.is_file():
        return local
    text = str(path)
    looks_local = isinstance(path, Path) or local.suffix in _SUFFIXES or text.startswith((".", "/", "~"))
    hub = parse_hub_name(text)
    if hub is not None and (not looks_local or local.is_dir()):
        return hub
    raise DataError.of(text, "missing", _missing_file(local))


def _missing_file(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"file not found: there is no folder {folder}"
    near = nearest(path.name, [entry.name for entry in folder.iterdir()])
    return f"file not found{f'; did you mean {folder / near}?' if near else ''}"


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".parquet" or file.read(4) == b"PAR1"
