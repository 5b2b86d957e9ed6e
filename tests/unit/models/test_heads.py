"""Heads: their settings, initial values that follow from the seed alone, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.adapters.full import head_modules
from salient_ds.config.run import ModelConfig, TrainConfig
from salient_ds.models.families import family_problems, precision_problem
from salient_ds.models.heads import head_settings, label_problem
from salient_ds.models.loading import load_base
from tests.support.tiny_heads import make_base

LABELS = ("no", "maybe", "yes")


def train(seed: int = 0) -> TrainConfig:
    sizes = {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "lr": 1.0, "precision": "fp32"}
    return TrainConfig.model_validate(sizes | {"seed": seed})


def model(path: Path, task: str = "sequence-classification", **more: Any) -> ModelConfig:
    return ModelConfig.model_validate({"path": str(path), "task": task, **more})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("heads")
    return {kind: make_base(folder / kind, kind) for kind in ("roberta", "t5", "deberta-v2", "bert")}


def test_settings() -> None:
    classes = head_settings(model(Path("x")), LABELS)
    assert classes["id2label"] == {0: "no", 1: "maybe", 2: "yes"} and classes["label2id"]["yes"] == 2
    assert head_settings(model(Path("x"), "regression"))["num_labels"] == 1
    assert head_settings(model(Path("x"), "seq2seq-lm")) == head_settings(model(Path("x"), "question-answering")) == {}


@pytest.mark.parametrize(("kind", "heads"), [("roberta", ("classifier",)), ("t5", ("classification_head",)),
                                             ("deberta-v2", ("pooler", "classifier"))])  # fmt: skip
def test_initial_values_follow_from_the_seed_alone(bases: dict[str, Path], kind: str, heads: tuple[str, ...]) -> None:
    eager = {"attn_implementation": "eager"} if kind == "deberta-v2" else {}
    torch.manual_seed(1)
    first = load_base(model(bases[kind], **eager), train(), {}, LABELS)
    again = load_base(model(bases[kind], **eager), train(), {}, LABELS)
    other = load_base(model(bases[kind], **eager), train(1), {}, LABELS)
    assert head_modules(first.model) == heads
    assert {name.partition(".")[0] for name in first.fresh} == set(heads)
    assert first.note is not None and first.fresh[0] in first.note
    weights = [name for name in first.fresh if name.endswith("weight")]
    for name in first.fresh:
        assert torch.equal(first.model.get_parameter(name), again.model.get_parameter(name))
    for name in weights:
        values = first.model.get_parameter(name)
        assert values.std() > 0 and not torch.equal(values, other.model.get_parameter(name))
    assert first.model.config.num_labels == 3  # type: ignore[union-attr]


def test_a_pooler_of_the_checkpoint_is_not_fresh(bases: dict[str, Path]) -> None:
    found = load_base(model(bases["bert"]), train(), {}, LABELS)
    assert found.fresh == ("classifier.bias", "classifier.weight")
    assert head_modules(found.model) == ("bert.pooler", "classifier")


def test_other_missing_weights_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_text((bases["roberta"] / "config.json").read_text())
    tensors = load_file(bases["roberta"] / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights of the model.*layer.1.output.dense.weight"):
        load_base(model(tmp_path), train(), {}, LABELS)


def test_heads_of_another_size_or_order_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    load_base(model(bases["roberta"]), train(), {}, LABELS).model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert load_base(model(tmp_path), train(), {}, LABELS).fresh == ()
    with pytest.raises(ValueError, match=r"classifier.out_proj.bias.*has shape \[3\].*\[2\].*number of classes"):
        load_base(model(tmp_path), train(), {}, LABELS[:2])
    with pytest.raises(ValueError, match="numbers its classes no, maybe, yes, and data.task.labels are yes, maybe, no"):
        load_base(model(tmp_path), train(), {}, LABELS[::-1])
    assert label_problem({0: "LABEL_0", 1: "LABEL_1"}, ("a", "b")) is None


def test_attention_that_a_model_lacks(bases: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="attn_implementation=sdpa: this model has eager"):
        load_base(model(bases["deberta-v2"]), train(), {}, LABELS)


@pytest.mark.parametrize(
    ("task", "config", "expected"),
    [
        ("causal-lm", {"model_type": "roberta"}, "is an encoder.*set model.task to sequence-classification"),
        ("causal-lm", {"model_type": "bert"}, "is an encoder"),
        ("causal-lm", {"model_type": "deberta-v2"}, "is an encoder"),
        ("causal-lm", {"model_type": "bart"}, "is an encoder-decoder.*set model.task=seq2seq-lm"),
        ("seq2seq-lm", {"model_type": "llama"}, "has no encoder and decoder"),
        ("seq2seq-lm", {"model_type": "bert", "is_encoder_decoder": False}, "has no encoder and decoder"),
        ("causal-lm", {"model_type": "roberta", "is_decoder": True}, None),
        ("causal-lm", {"model_type": "bart", "is_encoder_decoder": False}, None),
        ("causal-lm", {"model_type": "llama"}, None),
        ("sequence-classification", {"model_type": "t5"}, None),
        ("seq2seq-lm", {"model_type": "t5"}, None),
        ("seq2seq-lm", {}, None),
    ],
)
def test_families(task: str, config: dict[str, Any], expected: str | None) -> None:
    import re

    found = family_problems(task, json.loads(json.dumps(config)), "some/model")
    assert len(found) == (expected is not None)
    assert expected is None or re.search(expected, found[0])


def test_t5_in_fp16_cannot_be_sharded() -> None:
    assert precision_problem({"model_type": "t5"}, "fp16", True) is not None
    assert precision_problem({"model_type": "t5"}, "bf16", True) is None
    assert precision_problem({"model_type": "bart"}, "fp16", True) is None
