"""``allocations.jsonl``: one line per allocation event, written before training goes on."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from salient_ds.own_files import read_lines, sealed_line, write_whole


class AllocationRecord(BaseModel):
    """What one event decided and what it cost."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    step: int = Field(ge=0)
    """Applied optimizer steps when the decision was taken."""
    budget: int = Field(ge=0)
    """Allowed sum of ranks."""
    total_rank: int = Field(ge=0)
    """Sum of ranks after the event."""
    ranks: list[int]
    """Live rank of every adapted module, in the order of the run's rank layout."""
    threshold: float | None
    """Score at the cut; null if it is not finite (nothing, or everything, was cut)."""
    digest: str
    """SHA-256 of the decision; equal on all processes."""
    seconds_gather: float
    """Time to turn local statistics into global ones (s)."""
    seconds_solve: float
    """Time to decide (s)."""
    seconds_apply: float
    """Time to write the decision into masters, moments and masks (s)."""
    changed: int
    """Rows that the event switched on or off."""

    @field_validator("threshold")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None  # JSON has no NaN


def append_record(path: Path, record: AllocationRecord) -> None:
    """Append one line and force it to disk. A torn last line, left by a crash, is removed first."""
    created = not path.exists()
    with path.open("r+b" if not created else "x+b") as file:
        file.seek(_whole_length(file.read()))
        file.truncate()
        file.write(_line(record).encode())
        file.flush()
        os.fsync(file.fileno())
    if created:
        _sync_folder(path)


def _line(record: AllocationRecord) -> str:
    return sealed_line(record.model_dump(mode="json"))


def check_record(values: dict[str, Any]) -> None:
    """Raise ValueError if ``values`` are no allocation record."""
    try:
        AllocationRecord.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "line"
        raise ValueError(f"is not an allocation record ({where}: {first['msg']})") from error


def read_records(path: Path) -> list[AllocationRecord]:
    """All complete lines. A last line without a newline was torn by a crash and is ignored.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is not a record. The message names the file and the line number.
    """
    path.stat()
    return [AllocationRecord.model_validate(values) for values in read_lines(path, check_record)]


def truncate_after(path: Path, step: int) -> int:
    """Drop the events after ``step``, all or nothing. A run that resumes there takes them again.

    Returns:
        The number of dropped events; 0 if the file does not exist.
    """
    if not path.exists():
        return 0
    records = read_records(path)
    kept = [record for record in records if record.step <= step]
    write_whole(path, "".join(map(_line, kept)))
    _sync_folder(path)
    return len(records) - len(kept)


def _whole_length(content: bytes) -> int:
    return content.rfind(b"\n") + 1


def _sync_folder(path: Path) -> None:
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
