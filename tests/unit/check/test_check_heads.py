"""What ``salient-ds check`` knows of heads and families before a process starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salient_ds.check.model_files import inspect_model
from salient_ds.check.model_fit import fitting_model
from salient_ds.check.preflight import preflight
from salient_ds.check.report import Report
from salient_ds.check.target_layers import target_layout
from salient_ds.config.run import parse_config
from salient_ds.strict import ConfigError
from tests.support.tiny_heads import add_tokenizer, make_base, write_rows

CLASSES = {"kind": "classification", "columns": ["sentence"], "labels": ["no", "yes"], "metrics": ["accuracy", "f1"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("check")
    for kind in ("roberta", "deberta-v2", "bert", "bart"):
        add_tokenizer(make_base(folder / kind, kind))
    write_rows(folder / "rows.jsonl", 20)
    (folder / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    return folder


def settings(place: Path, kind: str, task: str = "sequence-classification", **sections: Any) -> dict[str, Any]:
    own = {"task": CLASSES} if task == "sequence-classification" else {}
    run: dict[str, Any] = {
        "output_dir": str(place / "run"), "deepspeed": str(place / "zero.json"),
        "model": {"path": str(place / kind), "task": task},
        "adapter": {"rank": 2, "target_modules": "all-linear"}, "method": {"name": "lora"},
        "data": {"train": str(place / "rows.jsonl"), "eval_size": 4, "max_length": 16, **own},
        "train": {"max_steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "lr": 0.01, "eval_every": 2},
    }  # fmt: skip
    return run | {name: run[name] | values for name, values in sections.items()}


def check(place: Path, kind: str, task: str = "sequence-classification", **sections: Any) -> Report:
    """The part of the check that looks at the model."""
    run, report = parse_config(settings(place, kind, task, **sections)), Report()
    files = inspect_model(run.model)
    try:
        built = fitting_model(run, files, False, report)
        if built is not None:
            target_layout(run, built, files, report)
    except ValueError as error:
        report.problems.append(str(error))
    return report


def test_an_encoder_is_no_causal_model(place: Path) -> None:
    report = check(place, "roberta", "causal-lm")
    assert any("is an encoder (model_type='roberta')" in problem for problem in report.problems)
    report = check(place, "bart", "causal-lm")
    assert any("set model.task=seq2seq-lm" in problem for problem in report.problems)


def test_presets_heads_and_sizes_are_known(place: Path) -> None:
    chosen = {"target_modules": "preset:bert", "also_train": ["LayerNorm"]}
    report = preflight(parse_config(settings(place, "bert", adapter=chosen)))
    assert report.problems == []
    facts = report.facts
    assert facts["targets"] == {"query": 2, "key": 2, "value": 2, "attention.output.dense": 2, "intermediate.dense": 2,
                                "output.dense": 4} and facts["modules"] == 12  # fmt: skip
    assert facts["in_full"]["modules"][-1] == "classifier" and len(facts["in_full"]["modules"]) == 1 + 5
    assert facts["in_full"]["parameters"] == 2 * 32 + 2 + 5 * 64 and facts["in_full"]["fresh"] == ["classifier"]
    frozen = check(place, "bert", adapter={"train_head": False})
    assert "in_full" not in frozen.facts
    assert any("stands still at random values" in note for note in frozen.notes)
    assert facts["trainable_start"] > facts["in_full"]["parameters"]


def test_attention_heads_and_modules_that_do_not_fit(place: Path, tmp_path: Path) -> None:
    report = check(place, "deberta-v2")
    assert any("attn_implementation=sdpa: this model has eager" in problem for problem in report.problems)
    assert check(place, "deberta-v2", model={"attn_implementation": "eager"}).problems == []
    report = check(place, "bert", adapter={"also_train": ["embed_tokens"]})
    assert any("adapter.also_train: 'embed_tokens' is no module" in problem for problem in report.problems)
    from transformers import AutoModelForSequenceClassification

    three = AutoModelForSequenceClassification.from_pretrained(place / "roberta", num_labels=3)
    three.save_pretrained(tmp_path / "three")
    add_tokenizer(tmp_path / "three")
    report = check(place, "bert", model={"path": str(tmp_path / "three")})
    assert any("is for 3 classes and this run has 2" in problem for problem in report.problems)
    config = json.loads((tmp_path / "three" / "config.json").read_text())
    named = {"0": "a", "1": "b", "2": "c"}
    (tmp_path / "three" / "config.json").write_text(json.dumps(config | {"id2label": named}))
    other = {"task": {"kind": "classification", "columns": ["sentence"], "labels": ["c", "b", "a"]}}
    report = check(place, "bert", model={"path": str(tmp_path / "three")}, data={"bad_rows": "skip", **other})
    assert any("numbers its classes a, b, c, and data.task.labels are c, b, a" in p for p in report.problems)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ({"best_metric": "acuracy"}, "train.best_metric=acuracy: this run has loss, accuracy, f1; did you mean"),
        ({"best_metric": "auto", "eval_every": 0}, "chooses among evaluations"),
        ({"patience": 2}, "train.patience=2 waits for a better train.best_metric"),
    ],
)
def test_metrics_that_are_not_there(place: Path, train: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(settings(place, "bert", train=train))
    assert any(expected in problem for problem in error.value.problems)
