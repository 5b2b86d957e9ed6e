"""``metrics.jsonl``: numbers of a run by step, one JSON object per line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append_metrics(path: Path, values: dict[str, Any]) -> None:
    """Append one line; ``values`` holds at least "step"."""
    assert "step" in values
    with path.open("a") as out:
        out.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines. A last line torn by a crash is ignored."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after ``step``. A run that resumes there writes them again."""
    if path.exists():
        kept = [row for row in read_metrics(path) if row["step"] <= step]
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_text("".join(json.dumps(row) + "\n" for row in kept))
        fresh.replace(path)
