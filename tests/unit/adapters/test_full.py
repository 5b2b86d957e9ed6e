"""Modules trained in full, and named lists of layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from salient_ds.adapters.full import Parts, parts
from salient_ds.adapters.inject import inject
from salient_ds.adapters.options import AdapterConfig
from salient_ds.adapters.presets import PRESETS
from salient_ds.adapters.survey import survey, whole_shape
from salient_ds.methods.lora.options import LoRAConfig
from tests.support.tiny_architectures import tiny_config

FAMILIES = {"bart": "bart", "bert": "bert", "deberta": "deberta-v2", "gemma": "gemma", "llama": "llama",
            "mistral": "mistral", "opt": "opt", "phi3": "phi3", "qwen": "qwen2", "roberta": "roberta",
            "t5": "t5"}  # fmt: skip


def built(kind: str, auto: str = "AutoModelForSequenceClassification", **more: Any) -> Any:
    import transformers

    config = tiny_config(kind)
    config.update(more)
    with torch.device("meta"):
        return getattr(transformers, auto).from_config(config)


def adapter(**more: Any) -> AdapterConfig:
    return AdapterConfig.model_validate({"rank": 2, **more})


def found(kind: str, **more: Any) -> Parts:
    return parts(built(kind, **more), whole_shape)


def test_fresh_heads_are_trained_by_default() -> None:
    bert = found("bert")
    assert bert.head == ("bert.pooler", "classifier")
    assert bert.trained(adapter()) == []
    assert bert.trained(adapter(), ["classifier.weight"]) == ["classifier"]
    assert bert.trained(adapter(train_head=True)) == ["bert.pooler", "classifier"]
    assert bert.trained(adapter(train_head=False), ["classifier.weight"]) == []
    assert bert.fresh(["pooler.dense.weight", "encoder.layer.0.output.dense.weight"]) == ["classifier"]
    assert bert.fresh(["bert.pooler.dense.weight", "classifier.bias"]) == []
    assert bert.elements(["classifier"]) == 2 * 32 + 2


def test_also_train_means_ends_of_paths_and_outermost_modules() -> None:
    llama = found("llama", auto="AutoModelForCausalLM", tie_word_embeddings=False)
    assert llama.trained(adapter(also_train=["embed_tokens", "lm_head"])) == ["model.embed_tokens", "lm_head"]
    norms = llama.trained(adapter(also_train=["input_layernorm", "layers.1"]))
    assert norms == ["model.layers.0.input_layernorm", "model.layers.1"]
    assert Parts.from_json(llama.to_json()) == llama


def test_errors_name_the_nearest() -> None:
    llama = found("llama", auto="AutoModelForCausalLM")
    with pytest.raises(ValueError, match=r"also_train: 'embed_token' is no module.*did you mean 'embed_tokens'"):
        llama.trained(adapter(also_train=["embed_token"]))
    with pytest.raises(ValueError, match="the model has no head beside its language model's"):
        llama.trained(adapter(train_head=True))
    with pytest.raises(ValueError, match="presets are bart.*did you mean 'deberta'"):
        adapter(target_modules="preset:debertta")


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_match_their_families(preset: str) -> None:
    """All linear layers of a block, and nothing else, for every family that has one."""
    kind = FAMILIES.get(preset, "t5")
    more: dict[str, Any] = {"is_gated_act": True, "dense_act_fn": "gelu_new"} if preset == "flan-t5" else {}
    two_parts = kind in ("bart", "t5")
    model = built(kind, "AutoModelForSeq2SeqLM" if two_parts else "AutoModelForSequenceClassification", **more)
    everything = survey(model)
    chosen = everything.select(f"preset:{preset}")
    assert chosen == everything.select("all-linear") and len(chosen) >= 4
    if two_parts:
        assert any("encoder_attn" in name or "EncDecAttention" in name for name in chosen)


def test_nothing_is_adapted_in_heads_and_in_modules_trained_in_full() -> None:
    everything = survey(built("roberta"))
    assert "head" in everything.unfit["classifier.dense"] and "classifier.dense" not in everything.linears
    with pytest.raises(ValueError, match="classifier.out_proj cannot be adapted"):
        everything.select(["query", "out_proj"])
    rest = everything.without(["roberta.encoder.layer.1"])
    assert all(".layer.0." in name for name in rest.linears)
    assert "adapter.also_train" in rest.unfit["roberta.encoder.layer.1.output.dense"]


def test_injection_freezes_everything_else() -> None:
    from transformers import RobertaForSequenceClassification

    model = RobertaForSequenceClassification(tiny_config("roberta"))
    chosen = adapter(target_modules=["query"], also_train=["word_embeddings"])
    adapted = inject(model, chosen, LoRAConfig(), 0, torch.float32, fresh=["classifier.out_proj.weight"])
    assert adapted.full == ("roberta.embeddings.word_embeddings", "classifier")
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert trained == set(adapted.names_in_full.values()) == {
        "roberta.embeddings.word_embeddings.weight", "classifier.dense.weight", "classifier.dense.bias",
        "classifier.out_proj.weight", "classifier.out_proj.bias",
    }  # fmt: skip


def test_models_that_are_not_of_transformers_have_no_head() -> None:
    assert parts(nn.Sequential(nn.Linear(2, 3)), whole_shape) == Parts({"0": 9})
