"""Tasks from a run file: names, descriptions, and one clear sentence for each thing that does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from salient_ds.config.run import load_config, parse_config
from salient_ds.data.tasks.table import KINDS, NAMED, task_of
from salient_ds.strict import ConfigError

OWN = {"kind": "classification", "columns": ["headline"], "labels": ["serious", "sarcastic"]}


def sections(task: Any, head: str = "sequence-classification", **data: Any) -> dict[str, Any]:
    return {
        "output_dir": "run",
        "deepspeed": "zero2.json",
        "model": {"path": "some/model", "task": head},
        "adapter": {"rank": 4, "target_modules": ["query"]},
        "method": {"name": "lora"},
        "data": {"task": task, **data},
        "train": {"epochs": 1, "global_batch_size": 8, "micro_batch_size": 8, "lr": 1e-3},
    }


def problems(*args: Any, **data: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse_config(sections(*args, **data))
    return error.value.problems


@pytest.mark.parametrize("name", NAMED)
def test_every_named_task_is_a_run_with_its_own_data(name: str) -> None:
    task = task_of(name)
    run = parse_config(sections(name, task.head))
    assert run.data.task == task and run.data.task.name == name
    assert (run.data.train, run.data.eval) == (task.train, task.eval)
    assert task.main_metric == task.metrics[0] in task.fitting_metrics and not task.lower_is_better
    again = parse_config(run.model_dump(mode="json", by_alias=True))
    assert again == run


def test_the_glue_tasks_are_as_their_publishers_define_them() -> None:
    found = {name: task_of(name) for name in NAMED if name.startswith("glue/")}
    assert {name: (task.columns, task.label_names, task.metrics[0]) for name, task in found.items()} == {
        "glue/cola": (("sentence",), ("unacceptable", "acceptable"), "matthews"),
        "glue/sst2": (("sentence",), ("negative", "positive"), "accuracy"),
        "glue/mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), "accuracy"),
        "glue/qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), "accuracy"),
        "glue/stsb": (("sentence1", "sentence2"), None, "correlation"),
        "glue/mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy"),
        "glue/mnli-mm": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "accuracy"),
        "glue/qnli": (("question", "sentence"), ("entailment", "not_entailment"), "accuracy"),
        "glue/rte": (("sentence1", "sentence2"), ("entailment", "not_entailment"), "accuracy"),
    }  # fmt: skip
    assert found["glue/mnli-mm"].eval == "nyu-mll/glue:mnli[validation_mismatched]"
    assert [task.num_labels for task in found.values()] == [2, 2, 2, 2, 1, 3, 3, 2, 2]


def test_a_task_of_a_file_uses_no_data_of_others() -> None:
    run = parse_config(sections("glue/mnli", train="mine.csv"))
    assert (run.data.train, run.data.eval) == ("mine.csv", None)
    run = parse_config(sections("glue/mnli", eval_size=0.1))
    assert (run.data.train, run.data.eval) == ("nyu-mll/glue:mnli[train]", None)


def test_a_description_replaces_fields_of_a_named_task(tmp_path: Path) -> None:
    task = task_of({"like": "squad/v2", "stride": 64, "null_threshold": -1.5})
    assert (task.name, task.stride, task.null_threshold, task.unanswerable) == ("squad/v2", 64, -1.5, True)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(sections({"like": "squad/v2"}, "question-answering")))
    run = load_config(path, ["data.task.stride=32"])
    assert run.data.task is not None and run.data.task.stride == 32
    with pytest.raises(ConfigError, match="cannot read .*run.yaml: Cannot merge"):
        load_config(path, ["data.task=[squad]"])


def test_labels_that_yaml_reads_as_numbers_are_names() -> None:
    assert task_of({**OWN, "labels": [0, 1, True]}).label_names == ("0", "1", "True")


def test_an_error_metric_is_better_when_smaller() -> None:
    task = task_of({"kind": "regression", "columns": ["text"], "metrics": ["mse", "pearson"]})
    assert task.lower_is_better and task.num_labels == 1 and task.label_names is None


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("glue/mnil", "data.task='glue/mnil' is no known task; did you mean 'glue/mnli'?; known are"),
        ({"like": "squad"}, "data.task='squad' is no known task; did you mean 'squad/v"),
        (7, "data.task=7: give the name of a task, or a mapping that describes one"),
        ({"columns": ["text"]}, "data.task has neither `kind` nor `like`: set data.task.like to the name of a task"),
        ({"kind": "clasification"}, "'clasification' is no kind of task; did you mean 'classification'?; known are"),
        ({**OWN, "labels": ["yes", "no", "yes"]}, "data.task.labels: 'yes' is given twice: every label needs a name"),
        ({**OWN, "metrics": []}, "data.task.metrics is empty: name at least one of accuracy, f1, f1_macro, matthews"),
        ({**OWN, "metrics": ["pearson"]}, "'pearson' does not fit a task of kind 'classification'; fitting ones are"),
        ({**OWN, "metrics": ["acuracy"]}, "'acuracy' is not known; did you mean 'accuracy'?; fitting ones are"),
        ({**OWN, "metrics": ["f1", "f1"]}, "data.task.metrics: f1, f1 names a metric twice: remove one"),
        ({"like": "glue/mnli", "metrics": ["f1"]}, "'f1' is that of one of two labels, but there are 3: use"),
        ({"like": "glue/rte", "columns": ["a", "a"]}, "data.task.columns names 'a' twice: name two columns, or one"),
        ({**OWN, "column": ["a"]}, "unknown key 'data.task.column': did you mean 'columns'?"),
        ({**OWN, "columns": ["a", "b", "c"]}, "data.task.columns"),
    ],
)  # fmt: skip
def test_one_sentence_for_a_task_that_cannot_be(task: Any, sentence: str) -> None:
    (problem,) = problems(task, train="rows.csv")
    assert sentence in problem


def test_bounds_are_in_order() -> None:
    task = {"kind": "regression", "columns": ["a"], "bounds": [5, 0]}
    (problem,) = problems(task, "regression", train="rows.csv")
    assert problem == "data.task.bounds=[5, 0]: the first must be below the second"


def test_own_tasks_need_data() -> None:
    (problem,) = problems(OWN)
    assert problem.startswith("missing key 'data.train'")


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_has_to_fit_the_task(kind: str) -> None:
    name = next(name for name, fields in NAMED.items() if fields["kind"] == kind)
    wanted = task_of(name).head
    (problem,) = problems(name, "causal-lm")
    assert problem == f"data.task={name} needs model.task={wanted}, not causal-lm: set model.task={wanted}"


def test_a_head_for_labels_needs_a_task() -> None:
    (problem,) = problems(None, train="alpaca.json")
    assert "model.task=sequence-classification needs a task with labels: set data.task" in problem


def test_settings_of_instruction_data_are_refused_with_a_task() -> None:
    found = problems("glue/rte", template="chatml", packing=True, format="alpaca", empty_answers="skip")
    assert [problem.partition("=")[0] for problem in found] == [
        "data.format", "data.template", "data.empty_answers", "data.packing"
    ]  # fmt: skip
    assert all("nothing reads it with data.task: remove it" in problem for problem in found)


def test_windows_advance_and_targets_fit_the_model() -> None:
    (problem,) = problems({"like": "squad/v1", "stride": 512}, "question-answering")
    assert "data.task.stride=512 must be below data.max_length=512" in problem
    task = task_of({"like": "summarisation/xsum", "max_target_length": 2000, "min_target_length": 3000})
    found = task.length_problems(512, 1024)
    assert [problem.partition("_length=")[0] for problem in found] == ["data.task.max_target", "data.task.min_target"]
    assert task.length_problems(512, None) == found[1:]


def test_what_generation_is_told() -> None:
    assert task_of("summarisation/xsum").generation == {"max_new_tokens": 64, "num_beams": 8}
    task = task_of({"like": "summarisation/cnn_dailymail", "length_penalty": 2.0, "min_target_length": 56})
    assert task.generation == {"max_new_tokens": 160, "min_new_tokens": 56, "num_beams": 4, "length_penalty": 2.0}
