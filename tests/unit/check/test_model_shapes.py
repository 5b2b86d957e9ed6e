"""Shapes derived from config.json equal those of the real models."""

from __future__ import annotations

from typing import Any

import pytest

from salient_ds.check.model_shapes import architecture, derived_linear_shapes, derived_parameters

BASE = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 96, "num_attention_heads": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama grouped": ("LlamaConfig", {"num_key_value_heads": 2}),
    "llama wide heads": ("LlamaConfig", {"num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"num_key_value_heads": 2}),
    "qwen2": ("Qwen2Config", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {"num_key_value_heads": 2}),
    "gemma": ("GemmaConfig", {"num_key_value_heads": 1}),
    "gemma2": ("Gemma2Config", {"num_key_value_heads": 2, "head_dim": 16}),
    "gemma3": ("Gemma3TextConfig", {"num_key_value_heads": 2, "head_dim": 16}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_to_the_model_that_transformers_builds(name: str) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    config_class, extra = FAMILIES[name]
    config = getattr(transformers, config_class)(**BASE, **extra)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    linear = {
        path: tuple(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and path != "lm_head"
    }
    given = config.to_dict() | {"model_type": config.model_type}
    assert derived_linear_shapes(given) == linear
    weights = sum(p.numel() for path, p in model.named_parameters() if not path.endswith("bias"))
    derived = derived_parameters(given)
    assert derived is not None
    if name in ("qwen3", "gemma3"):  # norms of queries and keys, a rounding error
        assert 0 <= weights - derived <= 4 * 2 * max(config.head_dim, 1)
    else:
        assert derived == weights


def test_llama_7b_is_6_738_billion() -> None:
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
              "num_attention_heads": 32, "vocab_size": 32000}  # fmt: skip
    assert derived_parameters(config) == 6_738_415_616
    assert len(derived_linear_shapes(config)) == 224


def test_defaults_where_config_json_is_silent() -> None:
    assert architecture(BASE | {"model_type": "gemma"}).head_dim == 256  # type: ignore[union-attr]
    assert architecture(BASE | {"model_type": "mistral"}).kv_heads == 8  # type: ignore[union-attr]
    assert architecture(BASE | {"model_type": "llama"}).kv_heads == 4  # type: ignore[union-attr]


def test_unknown_families_and_missing_numbers_are_not_guessed() -> None:
    assert architecture(BASE | {"model_type": "bert"}) is None
    assert derived_linear_shapes(BASE) == {}
    assert derived_parameters({"model_type": "llama", "hidden_size": 4}) is None
