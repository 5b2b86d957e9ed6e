"""The tasks that have a name, and how ``data.task`` of a run file becomes a task. No torch.

A named task is what its publishers define: columns, labels, metrics, the name of the official file, and where the data
is on the Hub. Lengths and beams of summaries are those of the papers whose recipes use them (``salient-ds recipes``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salient_ds.data.tasks.base import Task
from salient_ds.data.tasks.classification import ClassificationTask
from salient_ds.data.tasks.regression import RegressionTask
from salient_ds.data.tasks.spans import SpanTask
from salient_ds.data.tasks.summarisation import SummarisationTask
from salient_ds.strict import did_you_mean

KINDS: dict[str, type[Task]] = {
    kind.model_fields["kind"].default: kind
    for kind in (ClassificationTask, RegressionTask, SpanTask, SummarisationTask)
}  # fmt: skip


def _glue(
    config: str,
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[str, ...],
    submission: str,
    splits: tuple[str, str] = ("validation", "test"),
    submitted_as: str = "numbers",
) -> dict[str, Any]:
    hub = f"nyu-mll/glue:{config}"
    return {
        "kind": "classification",
        "columns": columns,
        "labels": labels,
        "metrics": metrics,
        "id_column": "idx",
        "train": f"{hub}[train]",
        "eval": f"{hub}[{splits[0]}]",
        "test": f"{hub}[{splits[1]}]",
        "submission": submission,
        "submitted_as": submitted_as,
    }


def _mnli(which: str, submission: str) -> dict[str, Any]:
    labels = ("entailment", "neutral", "contradiction")
    splits = (f"validation_{which}", f"test_{which}")
    return _glue("mnli", ("premise", "hypothesis"), labels, ("accuracy",), submission, splits, "names")


def _squad(hub: str, unanswerable: bool, submission: str) -> dict[str, Any]:
    return {
        "kind": "question-answering",
        "id_column": "id",
        "unanswerable": unanswerable,
        "train": f"{hub}[train]",
        "eval": f"{hub}[validation]",
        "submission": submission,
    }


_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")
NAMED: dict[str, dict[str, Any]] = {
    "glue/cola": _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews", "accuracy"), "CoLA.tsv"),
    "glue/sst2": _glue("sst2", ("sentence",), ("negative", "positive"), ("accuracy",), "SST-2.tsv"),
    "glue/mrpc": _glue("mrpc", _SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1"), "MRPC.tsv"),
    "glue/qqp": _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), "QQP.tsv"),
    "glue/stsb": {
        "kind": "regression",
        "columns": _SENTENCES,
        "bounds": (0, 5),
        "id_column": "idx",
        "train": "nyu-mll/glue:stsb[train]",
        "eval": "nyu-mll/glue:stsb[validation]",
        "test": "nyu-mll/glue:stsb[test]",
        "submission": "STS-B.tsv",
    },
    "glue/mnli": _mnli("matched", "MNLI-m.tsv"),
    "glue/mnli-mm": _mnli("mismatched", "MNLI-mm.tsv"),
    "glue/qnli": _glue("qnli", ("question", "sentence"), _ENTAILMENT, ("accuracy",), "QNLI.tsv", submitted_as="names"),
    "glue/rte": _glue("rte", _SENTENCES, _ENTAILMENT, ("accuracy",), "RTE.tsv", submitted_as="names"),
    "squad/v1": _squad("rajpurkar/squad", False, "predictions.json"),
    "squad/v2": _squad("rajpurkar/squad_v2", True, "predictions.json"),
    "summarisation/xsum": {
        "kind": "summarisation",
        "id_column": "id",
        "max_target_length": 64,
        "num_beams": 8,
        "train": "EdinburghNLP/xsum[train]",
        "eval": "EdinburghNLP/xsum[validation]",
        "test": "EdinburghNLP/xsum[test]",
    },
    "summarisation/cnn_dailymail": {
        "kind": "summarisation",
        "source_column": "article",
        "target_column": "highlights",
        "id_column": "id",
        "max_target_length": 160,
        "num_beams": 4,
        "train": "abisee/cnn_dailymail:3.0.0[train]",
        "eval": "abisee/cnn_dailymail:3.0.0[validation]",
        "test": "abisee/cnn_dailymail:3.0.0[test]",
    },
}
"""Fields of every task that ``data.task`` may name. The test sets of XSum and CNN/DailyMail have published targets."""


def task_of(value: str | Mapping[str, Any] | Task) -> Task:
    """The task that ``data.task`` means.

    Args:
        value: a name, or a mapping of fields. A mapping has ``kind``, or ``like`` with the name of a task whose fields
            it replaces: ``{like: squad/v2, stride: 64}``.

    Raises:
        ValueError: an unknown name or kind, with the nearest one, or fields that do not fit the kind (ValidationError).
    """
    if isinstance(value, Task):
        return value
    if isinstance(value, str):
        return task_of({"like": value})
    if not isinstance(value, Mapping):
        raise ValueError(f"data.task={value!r}: give the name of a task, or a mapping that describes one")
    fields = dict(value)
    like = fields.pop("like", None)
    if like is not None:
        if like not in NAMED:
            hint = did_you_mean(str(like), NAMED, before="; ")
            raise ValueError(f"data.task={like!r} is no known task{hint}; known are {', '.join(NAMED)}")
        fields = {"name": like, **NAMED[like], **fields}
    return kind_of(fields).model_validate(fields)


def kind_of(fields: Mapping[str, Any]) -> type[Task]:
    """The class for a mapping of fields, after ``like``. Raises ValueError for no kind or an unknown one."""
    kind = fields.get("kind", NAMED.get(str(fields.get("like")), {}).get("kind"))
    if kind is None:
        raise ValueError(
            "data.task has neither `kind` nor `like`: set data.task.like to the name of a task "
            f"({', '.join(NAMED)}), or data.task.kind to one of {', '.join(KINDS)}"
        )
    if kind not in KINDS:
        hint = did_you_mean(str(kind), KINDS, before="; ")
        raise ValueError(f"data.task.kind={kind!r} is no kind of task{hint}; known are {', '.join(KINDS)}")
    return KINDS[kind]
