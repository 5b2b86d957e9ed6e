"""Files of predictions as the official servers take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salient_ds.data.tasks.base import Prediction
from salient_ds.data.tasks.table import NAMED, task_of


def submitted(task: Any, values: list[Any], folder: Path, ids: Any = (10, 11)) -> dict[str, str]:
    predictions = [Prediction(id, value, 0.5, {"null_odds": -1.5}) for id, value in zip(ids, values, strict=True)]
    return {path.name: path.read_text(encoding="utf-8") for path in task.write_submission(predictions, folder)}


@pytest.mark.parametrize(
    ("name", "values", "file", "lines"),
    [
        ("glue/cola", [1, 0], "CoLA.tsv", ["10\t1", "11\t0"]),
        ("glue/sst2", [1, 0], "SST-2.tsv", ["10\t1", "11\t0"]),
        ("glue/mrpc", [1, 0], "MRPC.tsv", ["10\t1", "11\t0"]),
        ("glue/qqp", [1, 0], "QQP.tsv", ["10\t1", "11\t0"]),
        ("glue/stsb", [5.2, 0.12345], "STS-B.tsv", ["10\t5.000", "11\t0.123"]),
        ("glue/mnli", [0, 2], "MNLI-m.tsv", ["10\tentailment", "11\tcontradiction"]),
        ("glue/mnli-mm", [1, 1], "MNLI-mm.tsv", ["10\tneutral", "11\tneutral"]),
        ("glue/qnli", [1, 0], "QNLI.tsv", ["10\tnot_entailment", "11\tentailment"]),
        ("glue/rte", [1, 0], "RTE.tsv", ["10\tnot_entailment", "11\tentailment"]),
    ],
)
def test_glue(name: str, values: list[Any], file: str, lines: list[str], tmp_path: Path) -> None:
    assert submitted(task_of(name), values, tmp_path) == {file: "\n".join(["index\tprediction", *lines]) + "\n"}


def test_every_glue_file_has_a_name_of_its_own() -> None:
    names = [task_of(name).submission for name in NAMED if name.startswith("glue/")]
    assert len(set(names)) == len(names) == 9


def test_squad(tmp_path: Path) -> None:
    found = submitted(task_of("squad/v1"), ["Größe 1", "b"], tmp_path, ("x", "y"))
    assert {name: json.loads(text) for name, text in found.items()} == {"predictions.json": {"x": "Größe 1", "y": "b"}}
    found = submitted(task_of("squad/v2"), ["", "b"], tmp_path, ("x", "y"))
    assert {name: json.loads(text) for name, text in found.items()} == {
        "predictions.json": {"x": "", "y": "b"},
        "null_odds_predictions.json": {"x": -1.5, "y": -1.5},
    }


def test_summaries_and_own_tasks(tmp_path: Path) -> None:
    found = submitted(task_of("summarisation/xsum"), ["Ein Satz.", "b\nc"], tmp_path)
    rows = [json.loads(line) for line in found["summaries.jsonl"].splitlines()]
    assert rows == [{"id": 10, "summary": "Ein Satz."}, {"id": 11, "summary": "b\nc"}]
    own = task_of({"kind": "classification", "columns": ["text"], "labels": ["no", "yes"]})
    assert submitted(own, [1, 0], tmp_path) == {"predictions.tsv": "index\tprediction\n10\tyes\n11\tno\n"}
    free = task_of({"kind": "regression", "columns": ["text"]})
    assert submitted(free, [-7.0, 1e6], tmp_path)["predictions.tsv"].endswith("10\t-7.000\n11\t1000000.000\n")
