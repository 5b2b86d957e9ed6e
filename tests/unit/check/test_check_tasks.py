"""``salient-ds check`` on tasks with a metric: every row is read, the first are tokenised, nothing is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salient_ds.check import task_rows
from salient_ds.check.preflight import Report, preflight
from salient_ds.check.printing import run_check
from salient_ds.config.run import RunConfig, parse_config
from salient_ds.data.tasks import metrics

ROOT = Path(__file__).resolve().parents[3]
REVERSED = {"kind": "classification", "columns": ["text"], "labels": ["plain", "reversed"]}
CONTEXT = "the red stone lies in the blue river and the green garden has a table of paper " * 4


@pytest.fixture
def settings(tmp_path: Path, tiny_llama: Path) -> dict[str, Any]:
    rows = [{"text": "red blue green stone river cloud " * (1 + k), "label": k % 2} for k in range(8)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "output_dir": str(tmp_path / "run"),
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "model": {"path": str(tiny_llama), "task": "sequence-classification"},
        "adapter": {"rank": 4},
        "method": {"name": "lora"},
        "data": {"train": str(path), "task": REVERSED, "max_length": 32},
        "train": {"epochs": 2, "global_batch_size": 4, "micro_batch_size": 4, "lr": 1e-3, "precision": "fp32"},
    }


def make(settings: dict[str, Any], model: Any = None, **data: Any) -> RunConfig:
    changed = {"model": {**settings["model"], **(model or {})}, "data": {**settings["data"], **data}}
    return parse_config({**settings, **changed})


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenise in this process: starting another one for each test would take minutes."""

    def ask(module: str, question: dict[str, Any]) -> dict[str, Any]:
        answers: list[dict[str, Any]] = []
        monkeypatch.setattr(task_rows, "reply", answers.append)
        task_rows.main(json.loads(json.dumps(question)))
        if "error" in answers[0]:
            raise ValueError(answers[0]["error"])
        return answers[0]

    monkeypatch.setattr(task_rows, "ask", ask)


def questions(path: Path, question: str = "what is red?") -> Path:
    answers = {"text": ["stone"], "answer_start": [CONTEXT.index("stone")]}
    rows = [{"id": str(k), "question": question, "context": CONTEXT, "answers": answers} for k in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only_problem(report: Report) -> str:
    assert len(report.problems) == 1, report.problems
    return report.problems[0]


def test_a_sound_task(settings: dict[str, Any]) -> None:
    report = preflight(make(settings))
    assert report.problems == []
    assert (report.facts["rows"], report.facts["total_steps"], report.facts["total_steps_exact"]) == (8, 4, True)
    assert "train: plain 4, reversed 4" in report.notes
    assert any(note.endswith("are longer than data.max_length=32 tokens and were cut") for note in report.notes)
    assert preflight(make(settings), quick=True).facts["rows"] == 8


@pytest.mark.usefixtures("in_process")
def test_windows_are_estimated(settings: dict[str, Any], tmp_path: Path) -> None:
    path = questions(tmp_path / "q.jsonl")
    run = make(settings, {"task": "question-answering"}, task={"like": "squad/v1", "stride": 8}, train=str(path))
    report = preflight(run)
    assert report.problems == []
    assert report.facts["rows"] >= 6 and not report.facts["total_steps_exact"]
    assert f"train: 3 examples in {report.facts['rows']} windows of 32 tokens" in report.notes
    assert any("steps is an estimate: into how many windows contexts go" in note for note in report.notes)


@pytest.mark.usefixtures("in_process")
def test_a_question_without_room_for_its_context(settings: dict[str, Any], tmp_path: Path) -> None:
    path = questions(tmp_path / "q.jsonl", "red blue green stone river cloud " * 20)
    task = {"like": "squad/v1", "stride": 8}
    report = preflight(make(settings, {"task": "question-answering"}, task=task, train=str(path)))
    assert "question 0 has" in only_problem(report) and "for its context" in only_problem(report)


@pytest.mark.usefixtures("in_process")
def test_bad_rows_are_problems_of_the_check(settings: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("text,label\nred,plan\nblue,\n")
    report = preflight(make(settings, eval=str(path)))
    problem = only_problem(report)
    assert "2 problems (1 x unknown label, 1 x no label)" in problem and "did you mean 'plain'?" in problem
    path.write_text("text,lable\nred,plain\n")
    assert "there is no column 'label'; did you mean 'lable'?" in only_problem(
        preflight(make(settings, eval=str(path)))
    )
    path.write_text("text,label\nred,plan\nred,plain\n")
    report = preflight(make(settings, eval=str(path), bad_rows="skip"))
    assert report.problems == [] and report.facts["eval_rows"] == 1
    assert "eval: 1 rows are left out (1 x unknown label)" in report.notes


def test_a_missing_library_is_a_problem_of_the_check(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    report = preflight(make(settings), quick=True)
    assert "the metrics accuracy need scikit-learn, which is not installed: pip install" in only_problem(report)


def test_rows_are_read_without_a_tokenizer(settings: dict[str, Any], tmp_path: Path, tiny_llama: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    report = preflight(make(settings, {"path": str(model), "random_weights": True}))
    assert "train: rows were not tokenised, the tokenizer is not here" in report.notes
    assert "holds no tokenizer" in only_problem(report)


@pytest.mark.usefixtures("in_process")
def test_the_report_names_the_task(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps({**settings, "data": {**settings["data"], "max_length": 512}}))
    assert run_check(str(tmp_path / "run.yaml"), [], 1, False) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "task own" in out and "template" not in out
