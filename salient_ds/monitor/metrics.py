"""``metrics.jsonl``: numbers of a run by step, one JSON object per line."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from typing import Any

from salient_ds.own_files import read_lines, sealed_line, write_whole


def append_metrics(path: Path, values: dict[str, Any]) -> None:
    """Append one line. ``values`` hold at least "step"; numbers that are not finite become null."""
    assert "step" in values
    plain = {k: None if isinstance(v, float) and not isfinite(v) else v for k, v in values.items()}
    with path.open("a") as out:
        out.write(sealed_line(plain))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines. A last line torn by a crash is ignored.

    Raises:
        ValueError: another line is damaged. The message names the file and the line number.
    """
    return read_lines(path)


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after ``step``, all or nothing. A run that resumes there writes them again.

    Raises:
        ValueError: as :func:`read_metrics`.
    """
    if path.exists():
        write_whole(path, "".join(sealed_line(row) for row in read_metrics(path) if row["step"] <= step))
