"""Reads the rows of a task from a file or a data set name, and reports every bad row. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from salient_ds.data.conversation import DataError, OnBadRow, Problem, ProblemLog, RowError
from salient_ds.data.sources import count_rows, is_local, open_source
from salient_ds.data.tasks.base import Example, Task
from salient_ds.data.tasks.squad_files import flattened


@dataclass(frozen=True)
class TaskRows:
    """What a source holds."""

    path: str
    rows: int
    """Usable rows."""
    labels: Mapping[str, int]
    """Per label the number of rows with it; empty for tasks without classes."""
    unlabelled: int
    """Rows without a label."""
    skipped: Mapping[str, int]
    """Rows left out on request, by kind of problem."""
    remarks: Mapping[str, int] = field(default_factory=dict)
    """What was corrected, and in how many rows."""

    def notes(self, name: str) -> list[str]:
        """What a user should know; ``name`` is the part of the data, as in "train"."""
        notes = []
        if self.skipped:
            kinds = ", ".join(f"{count:,} x {kind}" for kind, count in self.skipped.items())
            notes.append(f"{name}: {sum(self.skipped.values()):,} rows are left out ({kinds})")
        if self.labels:
            notes.append(f"{name}: {', '.join(f'{label} {count:,}' for label, count in self.labels.items())}")
            absent = [label for label, count in self.labels.items() if not count]
            if absent and self.unlabelled < self.rows:
                notes.append(f"{name}: no row has the label {', '.join(absent)}")
        notes += [f"{name}: {remark} ({count:,} rows)" for remark, count in self.remarks.items()]
        if self.unlabelled:
            notes.append(f"{name}: {self.unlabelled:,} of {self.rows:,} rows have no label")
        return notes


def read_examples(
    task: Task, path: str | Path, labelled: bool = True, bad_rows: OnBadRow = "error", limit: int | None = None
) -> tuple[list[Example], TaskRows]:
    """Reads and validates the rows of a task.

    Args:
        path: a JSON list, JSONL, CSV, TSV or parquet file (.gz too), or a `datasets` name.
        labelled: rows without a label are errors. False: the test split, for which there are predictions only.
        bad_rows: "skip" leaves bad rows out and counts them.
        limit: read only so many rows.

    Raises:
        DataError: lists every kind of problem with its count; also for a source that cannot be read or is empty.
    """
    reading = _Reading(task, path, labelled, bad_rows)
    examples = list(reading.examples(limit))
    return examples, reading.summary(examples)


def check_task_file(
    task: Task, path: str | Path, labelled: bool = True, bad_rows: OnBadRow = "error", limit: int | None = None
) -> TaskRows:
    """As :func:`read_examples`, the summary alone. ``salient-ds check`` calls it for local files."""
    return read_examples(task, path, labelled, bad_rows, limit)[1]


def count_task_rows(path: str | Path) -> int:
    """Number of rows of a local file without validation; questions, for SQuAD's own files.

    Raises DataError for a missing or empty file, and for a `datasets` name.
    """
    if not is_local(path):
        return count_rows(path)  # says that it cannot
    return sum(1 for _ in flattened(open_source(path)))


class _Reading:
    """One pass over one source."""

    def __init__(self, task: Task, path: str | Path, labelled: bool, bad_rows: OnBadRow) -> None:
        if bad_rows not in ("error", "skip"):
            raise ValueError(f'bad_rows="{bad_rows}": must be "error" or "skip"')
        self.task, self.path, self.labelled, self.bad_rows = task, str(path), labelled, bad_rows
        self.source = open_source(path)
        self.skipped: Counter[str] = Counter()

    def examples(self, limit: int | None) -> Iterator[Example]:
        log = ProblemLog(self.source.name, self.source.unit)
        seen: dict[int | str, int] = {}  # identifier -> line
        good = 0
        for number, (line, row) in enumerate(islice(flattened(self.source), limit)):
            found = row if isinstance(row, Problem) else self._parse(row, number, line)
            if isinstance(found, Example) and found.id in seen:
                what = f"identifier {found.id!r} is that of {self.source.unit} {seen[found.id]} too"
                found = Problem("identifier twice", line, f"{what}: predictions could not be told apart")
            if isinstance(found, Example):
                good += 1
                seen[found.id] = line
                yield found
            elif self.bad_rows == "skip":
                self.skipped[found.kind] += 1
            else:
                log.add(found)
        log.raise_if_any()
        if not good:
            kinds = ", ".join(self.skipped)
            why = f": all {sum(self.skipped.values())} rows are left out ({kinds})" if self.skipped else ""
            raise DataError(self.source.name, [Problem("empty", 0, f"there are no rows{why}")])

    def _parse(self, row: object, number: int, line: int) -> Example | Problem:
        if not isinstance(row, Mapping):
            return Problem("no object", line, f"the row is {type(row).__name__}, expected an object with columns")
        try:
            return self.task.parse(_plain(row), number, self.labelled)
        except RowError as error:
            return Problem(error.kind, line, str(error))

    def summary(self, examples: list[Example]) -> TaskRows:
        names = self.task.label_names
        counts = Counter(example.target for example in examples if example.target is not None) if names else Counter()
        labels = {name: counts[number] for number, name in enumerate(names)} if names else {}
        unlabelled = sum(example.target is None for example in examples)
        remarks = Counter(example.remark for example in examples if example.remark is not None)
        return TaskRows(self.path, len(examples), labels, unlabelled, dict(self.skipped.most_common()), dict(remarks))


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in row.items()}
