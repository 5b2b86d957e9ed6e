"""Tiny models for the packing tests: windows and chunks are shorter than the examples, every kind of layer is there."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from salient_ds.data.collate import Collator
from salient_ds.data.packing import pack_examples, plan_packs
from tests.support.tiny_architectures import OWN, SMALL

LENGTHS = (5, 9, 3, 12, 7, 4)
ROOM = 16
"""Tokens per packed row: two or three examples and some padding."""

SHORT: dict[str, Any] = {
    "initializer_range": 0.3, "sliding_window": 4, "local_attention": 4, "attention_chunk_size": 4, "window_size": 4,
    "keep_window_size": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attention_dropout": 0.0,
    "moe_num_experts": 4, "moe_k": 2, "num_kv_heads": 2, "dropout": 0.0,
}  # fmt: skip
_SPANS = ("sliding_window", "local_attention", "attention_chunk_size", "window_size", "keep_window_size")
LONG = dict.fromkeys(_SPANS, 64)
"""The same windows and chunks, longer than the examples."""

_BOTH = {"layer_types": ["sliding_attention", "full_attention"]}
_SLIDING = _BOTH | {"use_sliding_window": True}
_YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 4,
    "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
OTHERS: dict[str, dict[str, Any]] = {
    "dots1": OWN["dots1"] | _BOTH,
    "gemma3n_text": _BOTH | {
        "num_kv_shared_layers": 0, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0],
        "intermediate_size": 48, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
    },
    "granitemoehybrid": {"layer_types": ["attention"] * 2}, "laguna": _BOTH,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"no_rope_layers": [1, 0], "intermediate_size_mlp": 48}, "mellum": _BOTH,
    "ministral3": {"rope_parameters": _YARN}, "qwen2": _SLIDING, "qwen2_moe": _SLIDING, "qwen3": _SLIDING,
    "qwen3_moe": {"use_sliding_window": True}, "qwen3_next": {"num_hidden_layers": 2},
    "smollm3": _SLIDING | {"no_rope_layers": [1, 0]},
}  # fmt: skip
"""Settings of one model_type besides those that all tests share."""
_LAYERS = ("layer_types", "mlp_layer_types", "layers_block_type")


def _settings(given: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """What to set in the configuration ``given``: one layer of every kind, at least two."""
    known, kind = given.to_dict(), given.model_type
    wanted = {
        name: value
        for name, value in (SMALL | SHORT).items()
        if (name in known or name in given.attribute_map) and known.get(name) != value
    }
    for name in _LAYERS:
        if known.get(name):
            kinds = list(dict.fromkeys(known[name]))
            wanted[name] = (kinds * 2)[: max(2, len(kinds))]
            wanted["num_hidden_layers"] = len(wanted[name])
    return wanted | OWN.get(kind, {}) | OTHERS.get(kind, {}) | {k: v for k, v in changes.items() if k in known}


def tiny(kind: str, attention: str, **changes: Any) -> nn.Module:
    """A model of ``kind`` with random weights in fp32, the same ones for every ``attention``."""
    from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

    given = AutoConfig.for_model(kind)
    parts = {
        name: type(part)(**_settings(part, changes)).to_dict()
        for name, part in vars(given).items()
        if isinstance(part, PretrainedConfig)
    }
    config = AutoConfig.for_model(kind, **(_settings(given, changes) | parts))
    torch.manual_seed(0)
    made: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    draw = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        if parameter.ndim < 2:
            parameter.data.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    made.config.use_cache = False  # type: ignore[union-attr]
    return made.eval()


def examples() -> list[dict[str, np.ndarray]]:
    """Examples of ``LENGTHS`` tokens; the first half of each is no target."""
    draw, made = np.random.RandomState(2), []
    for length in LENGTHS:
        ids = draw.randint(8, 90, size=length)
        made.append({"input_ids": ids, "labels": np.where(np.arange(length) < length // 2, -100, ids)})
    return made


def packed(attention: str) -> dict[str, Tensor]:
    """The examples as training packs them."""
    return Collator(0, attn_implementation=attention)(list(pack_examples(examples(), LENGTHS, ROOM)))


def alone(model: nn.Module) -> list[Tensor]:
    """Logits (tokens, vocabulary) of each example by itself."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor(example["input_ids"])[None]).logits[0] for example in examples()]


def together(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """Logits (tokens, vocabulary) of each example in a packed batch."""
    with torch.no_grad():
        logits_BSV = model(**batch).logits
    found, start = {}, 0
    for row, pack in enumerate(plan_packs(LENGTHS, ROOM)):
        start = start if len(logits_BSV) == 1 else 0
        for index in pack:
            found[index] = logits_BSV[row % len(logits_BSV), start : start + LENGTHS[index]]
            start += LENGTHS[index]
    return [found[index] for index in range(len(LENGTHS))]


def difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, as a share of the largest logit."""
    worst = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    return worst / max(float(logits.abs().max()) for logits in expected)
