"""What a run directory says about the run, for its report. Damaged and missing files become sentences. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salient_ds.monitor.directory import OWN_FILES, RunDirectory, RunDirectoryError
from salient_ds.monitor.events import AllocationRecord, check_record
from salient_ds.own_files import read_object, read_settings, split_lines


@dataclass
class RunFacts:
    """Everything that is known. What is not there is empty."""

    path: Path
    settings: dict[str, Any] = field(default_factory=dict)
    """The resolved run file."""
    facts: dict[str, Any] = field(default_factory=dict)
    """run.json."""
    summary: dict[str, Any] = field(default_factory=dict)
    ds_config: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    records: list[AllocationRecord] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """One sentence for each file, or line, that cannot be used."""

    @property
    def modules(self) -> list[str]:
        """Paths of the adapted modules; empty if they are not known."""
        found = self.facts.get("modules")
        return [str(name) for name in found] if isinstance(found, list) else []

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of a metric."""
        points = [(row["step"], row[key]) for row in self.metrics if is_number(row.get(key))]
        return [step for step, _ in points], [float(value) for _, value in points]

    def held_out_names(self) -> list[str]:
        """Names of the held-out metrics, without "eval_"."""
        return list(dict.fromkeys(key[5:] for row in self.metrics for key in row if key.startswith("eval_")))

    def start_ranks(self) -> list[int]:
        """Rank of every matrix before the first event, as far as it is known; else empty."""
        found = self.facts.get("initial_ranks")
        if isinstance(found, list) and len(found) == len(self.modules) and all(isinstance(r, int) for r in found):
            return found
        return []


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def gather(path: Path) -> RunFacts:
    """Read what there is.

    Raises:
        RunDirectoryError: ``path`` is no folder, or holds nothing of a run.
    """
    if not path.is_dir():
        raise RunDirectoryError(f"{path} is {'a file' if path.exists() else 'not there'}: give a run directory")
    if not any(
        (path / name).exists() for name in OWN_FILES if name not in (".lock", ".shared", "evaluation", "search")
    ):
        raise RunDirectoryError(f"{path} is no run directory: it has neither run.yaml nor metrics.jsonl")
    run, found = RunDirectory(path), RunFacts(path)
    found.settings = _read(found, path / "run.yaml", read_settings)
    found.facts = _read(found, path / "run.json", read_object)
    finished = found.facts.get("finished") is not None
    found.summary = _read(found, run.summary, read_object, quiet=not finished)
    found.ds_config = _read(found, path / "ds_config.json", _plain_object)
    found.evaluation = _read(found, path / "evaluation" / "evaluation.json", _plain_object, quiet=True)
    found.metrics = _lines(found, run.metrics)
    records = _lines(found, run.allocations, check_record)
    found.records = [AllocationRecord.model_validate(values) for values in records]
    _fitting_records(found)
    if not found.metrics and run.metrics.exists():
        found.problems.append(f"{run.metrics.name} has no line yet: curves follow once steps are logged")
    elif not run.metrics.exists():
        found.problems.append(f"{run.metrics.name} is missing: there are no curves")
    return found


def _read(found: RunFacts, path: Path, reader: Callable[[Path], dict[str, Any]], quiet: bool = False) -> dict[str, Any]:
    """Read a file. ``quiet``: that it is missing is no problem."""
    try:
        return reader(path)
    except FileNotFoundError:
        if not quiet:
            found.problems.append(f"{path.name} is missing")
    except OSError as error:
        found.problems.append(f"{path.name} cannot be read: {error.strerror or error}")
    except ValueError as error:
        found.problems.append(str(error))
    return {}


def _plain_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged (it holds no JSON object)")
    return values


def _lines(
    found: RunFacts, path: Path, check: Callable[[dict[str, Any]], None] = lambda values: None
) -> list[dict[str, Any]]:
    try:
        whole, broken = split_lines(path, check)
    except OSError as error:
        found.problems.append(f"{path.name} cannot be read: {error.strerror or error}")
        return []
    if broken:
        number, problem = broken[0]
        more = f" ({len(broken) - 1} more lines are damaged)" if len(broken) > 1 else ""
        found.problems.append(f"{path.name}, line {number} {problem}: it is left out{more}")
    return whole


def _fitting_records(found: RunFacts) -> None:
    """Leave out events of another number of modules than run.json names."""
    modules = found.modules
    if not found.records:
        return
    if not modules:
        found.problems.append("the names of the matrices are not known: the rank map is left out")
        return
    wrong = [record.step for record in found.records if len(record.ranks) != len(modules)]
    if wrong:
        found.problems.append(
            f"the event of step {wrong[0]} has another number of ranks than the {len(modules)} matrices of run.json: "
            "it is left out"
        )
    found.records = [record for record in found.records if len(record.ranks) == len(modules)]


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested sections as dotted keys with values as text."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            rows += flat(value, f"{prefix}{key}.")
        elif value is not None:
            rows.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)))
    return rows
