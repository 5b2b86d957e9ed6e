"""Check the data of a task with a metric: every row, and some of them with the run's tokenizer. No torch here.

Tokenising runs in a process of its own, because transformers may load torch.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from salient_ds.check.helper_process import ask, reply, tokenizer_of
from salient_ds.check.model_files import inspect_model
from salient_ds.check.report import Report
from salient_ds.check.tokenizer_files import has_tokenizer
from salient_ds.config.data import DataConfig
from salient_ds.config.run import RunConfig
from salient_ds.data.tasks.reading import check_task_file, count_task_rows

SAMPLE = 1000
"""Rows that are tokenised, to see what is cut and into how many windows contexts go."""


def task_rows(run: RunConfig, name: str, path: str, quick: bool, report: Report) -> int:
    """Number of inputs of the model that a local file becomes. Adds notes about it to the report.

    In question answering the number is an estimate from the first rows, unless the tokenizer is not on this machine:
    then it is the number of questions.

    Args:
        name: part of the data, "train" or "eval".
        quick: count rows without validating them.

    Raises:
        DataError: bad rows, with counts by kind.
        ValueError: rows that the tokenizer cannot encode.
    """
    task = run.data.task
    assert task is not None
    if quick:
        return count_task_rows(path)
    found = check_task_file(task, path, True, run.data.bad_rows)
    report.notes += found.notes(name)
    folder = _tokenizer_folder(run)
    if folder is None:
        report.notes.append(f"{name}: rows were not tokenised, the tokenizer is not here")
        return found.rows
    question = {
        "task": task.model_dump(mode="json"), "path": path, "bad_rows": run.data.bad_rows, "tokenizer": folder,
        "trust_remote_code": run.model.trust_remote_code, "max_length": run.data.max_length,
    }  # fmt: skip
    answer = ask(__name__, question)
    report.notes += [str(note).replace("{name}", name) for note in answer["notes"]]
    return round(found.rows * float(answer["per_row"]))


def rough_steps(data: DataConfig) -> str | None:
    """What the number of steps is if it is not exact before the data is tokenised; None if it is exact."""
    if data.packing:
        return "an upper bound: with data.packing the number of sequences is known later"
    if data.task is not None and data.task.windows:
        return "an estimate: into how many windows contexts go is known later"
    return None


def _tokenizer_folder(run: RunConfig) -> str | None:
    """Where the run's tokenizer is on this machine; None if it is not."""
    named = run.model.tokenizer
    folder = Path(named).expanduser() if named else inspect_model(run.model).directory
    return str(folder) if folder is not None and has_tokenizer(folder) else None


def main(question: dict[str, Any]) -> None:
    """Answer one question."""
    from salient_ds.data.tasks.dataset import load_task
    from salient_ds.data.tasks.table import task_of

    tokenizer = tokenizer_of(question)
    if tokenizer is None:
        return
    task, path, longest = task_of(question["task"]), question["path"], question["max_length"]
    try:
        dataset, report = load_task(
            task, path, tokenizer, longest, training=True, bad_rows=question["bad_rows"], limit=SAMPLE
        )
    except ValueError as error:
        reply({"error": str(error)})
        return
    notes = report.cut_notes("{name}")
    if notes and report.rows.rows == SAMPLE:
        notes = [f"{note} (of the first {SAMPLE:,} rows)" for note in notes]
    reply({"per_row": len(dataset) / report.rows.rows, "notes": notes})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
