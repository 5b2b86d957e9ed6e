"""``salient-ds evaluate``: scores a run, an adapter or a model on a task, on one or several processes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from salient_ds.run.exits import print_problems
from salient_ds.run.process import launched
from salient_ds.run.targets import EvaluateOptions, Target, baseline_of, target_of

if TYPE_CHECKING:
    import torch

    from salient_ds.run.evaluating import Outcome
    from salient_ds.run.inputs import Inputs

TIMEOUT_MINUTES = 60.0
"""How long a process waits for the others."""


def run_evaluate(place: str, options: EvaluateOptions) -> int:
    """Evaluate on the processes that the launcher started (or on this one), and return the exit status."""
    try:
        target = target_of(place, options)
        problems = target.task.library_problems()
        folder = Path(options.output) if options.output else _default_folder(target)
        if not problems:
            from salient_ds.export.atomic import check_target

            check_target(folder, options.overwrite, protected=(place, target.base))
    except (ValueError, OSError) as error:
        problems = str(error).splitlines()
    if problems:
        print_problems(problems if int(os.environ.get("RANK", "0")) == 0 else [])
        return 2
    return launched(lambda device: _evaluate(target, folder, options, device), TIMEOUT_MINUTES)


def _default_folder(target: Target) -> Path:
    """A run keeps its evaluation; of anything else it lies beside it, or in the working directory."""
    place = Path(target.place).expanduser()
    if target.kind == "run":
        return place / "evaluation"
    if place.is_dir():
        return place.with_name(f"{place.resolve().name}-evaluation")
    return Path(f"{target.place.replace('/', '--')}-evaluation")


def _evaluate(target: Target, folder: Path, options: EvaluateOptions, device: torch.device) -> None:
    from salient_ds.zero.collectives import all_succeeded, world

    began = time.time()
    outcome, inputs, notes = score(target, options, device)
    columns: dict[str, Mapping[str, float]] = {target.place: outcome.values}
    if options.baseline and target.kind != "model":
        found, _, more = score(baseline_of(target), options, device)
        columns[target.base] = found.values
        notes += [note for note in more if note not in notes]
    if world().global_rank == 0:
        facts = {"target": target.place, "kind": target.kind, "base": target.base,
                 "task": target.task.model_dump(mode="json"), "data": target.data, "split": options.split,
                 "max_length": target.max_length, "precision": target.precision, "processes": world().world_size,
                 "examples": len(outcome.predictions), "scores": _plain(outcome.values),
                 "baseline": _plain(columns[target.base]) if len(columns) > 1 else None, "notes": notes,
                 "seconds": round(time.time() - began, 1)}  # fmt: skip
        write(folder, facts, outcome, inputs, options.overwrite, (target.base,))
        print_table(columns, target, notes)
        print(folder)
    all_succeeded(True, device)


def _plain(values: Mapping[str, float]) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _facts(target: Target, inputs: Inputs) -> dict[str, Any]:
    """What all processes have to have: packages, task, weights and rows."""
    from salient_ds.models.fingerprint import weights_fingerprint
    from salient_ds.run.same_everywhere import package_facts

    base, place, rows = Path(target.base).expanduser(), Path(target.place).expanduser(), inputs.scored
    adapters = [place / name for name in ("adapter_model.safetensors", "adapter/adapter_model.safetensors")]
    return package_facts() | {
        "task": target.task.model_dump(mode="json"),
        "base weights": weights_fingerprint(base) if base.is_dir() else None,
        "adapter": [hashlib.sha256(path.read_bytes()).hexdigest() for path in adapters if path.is_file()],
        "rows": None if rows is None else rows.fingerprint(),
    }


def score(target: Target, options: EvaluateOptions, device: torch.device) -> tuple[Outcome, Inputs, list[str]]:
    """Load the model and the data of ``target`` and evaluate. Collective: all processes call it.

    Raises:
        NodesDiffer: a process has other packages, weights or rows.
    """
    from salient_ds.run.evaluating import Speaker, evaluate
    from salient_ds.run.same_everywhere import agreed
    from salient_ds.run.scored import load_rows, load_target

    loaded = load_target(target, device)
    inputs, notes = load_rows(target, loaded.tokenizer, options.limit)
    agreed(lambda: _facts(target, inputs), device)
    inputs = inputs.for_model(loaded.base)
    speaker = Speaker(loaded.model, lambda **settings: loaded.model.generate(**settings))
    found = evaluate(inputs, speaker, options.batch, device, loaded.tokenizer)
    return found, inputs, loaded.notes + notes


def write(
    folder: Path, facts: Mapping[str, Any], outcome: Outcome, inputs: Inputs, overwrite: bool, protected: Sequence[str]
) -> None:
    """Write evaluation.json, predictions.jsonl and, for the test split, the official file. All or nothing."""
    from salient_ds.export.atomic import atomic_directory
    from salient_ds.export.meta import installed_versions, write_json

    data = inputs.scored
    assert data is not None
    with atomic_directory(folder, overwrite, protected=protected) as fresh:
        write_json(fresh / "evaluation.json", {**facts, "versions": installed_versions()})
        with (fresh / "predictions.jsonl").open("w", encoding="utf-8") as file:
            for example, prediction in zip(data.examples, outcome.predictions, strict=True):
                line = {"id": prediction.id, "label": data.task.shown(example.target),
                        "prediction": data.task.shown(prediction.value), "score": prediction.score,
                        **prediction.details}  # fmt: skip
                if prediction.span is not None:
                    line["span"] = prediction.span
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        if not data.labelled:
            (fresh / "submission").mkdir()
            data.task.write_submission(list(outcome.predictions), fresh / "submission")


def print_table(columns: Mapping[str, Mapping[str, float]], target: Target, notes: Sequence[str]) -> None:
    """Print one row per metric and one column per model."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    table = Table(title=f"{target.task.name}, {target.data}", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("metric")
    for place in columns:
        table.add_column(place, justify="right", no_wrap=True)
    for name in next(iter(columns.values())):
        table.add_row(name, *(f"{values[name]:.4f}" for values in columns.values()))
    console.print(table)
    for note in notes:
        console.print(f"note: {note}", style="yellow")
