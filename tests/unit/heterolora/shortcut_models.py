"""Tiny models of every architecture that shortcuts are defined for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from salient_ds.adapters.inject import AdaptedModel, inject
from salient_ds.adapters.options import AdapterConfig, ShortcutConfig
from salient_ds.heterolora.injection import add_shortcuts
from salient_ds.heterolora.options import HeteroLoRAConfig

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
GATED = {**SIZES, "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 32, "head_dim": 8}
OPT = {**SIZES, "ffn_dim": 24, "max_position_embeddings": 32, "word_embed_proj_dim": 12, "dropout": 0.1}

MODELS: dict[str, Callable[[], Any]] = {
    "opt-post": lambda: OPTForCausalLM(OPTConfig(**OPT, do_layer_norm_before=False)),
    "opt-pre": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "roberta": lambda: RobertaForMaskedLM(
        RobertaConfig(**SIZES, intermediate_size=24, max_position_embeddings=34, type_vocab_size=1)
    ),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**GATED)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GATED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GATED)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**GATED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GATED)),
}
TARGETS = {"roberta": ["query", "value"]}


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The same random model at every call, in eval mode; norms and biases are random, so that they matter."""
    torch.manual_seed(3)
    model = MODELS[name]()
    for key, parameter in model.named_parameters():
        if "norm" in key.lower() or key.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def adapt(model: Any, name: str, norm: Any = "none", warm: bool = False, **options: Any) -> AdaptedModel:
    """Query and value projections and shortcuts of rank 2; ``warm``: B is random instead of zero."""
    shortcuts = ShortcutConfig(rank=2, norm_after_shortcut=norm, **options)
    targets = TARGETS.get(name, ["q_proj", "v_proj"])
    adapter = AdapterConfig(rank=2, alpha=16, target_modules=targets, shortcuts=shortcuts)
    adapted = inject(model, adapter, HeteroLoRAConfig(), 0, model.dtype)
    add_shortcuts(adapted, adapter, 0, model.dtype)
    generator = torch.Generator().manual_seed(4)
    for module in adapted.adapters.values() if warm else []:
        B_OR = module.factors()["B"].parameter
        B_OR.data = 0.1 * torch.randn(B_OR.shape, generator=generator).to(B_OR.dtype)
    return adapted


def batch() -> dict[str, Tensor]:
    """Two rows of 7 tokens, one of them padded; labels as for a language model."""
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def outputs(model: Any) -> list[Tensor]:
    """Everything that comes out of a pass, hidden states included; dropout, where it is on, with a fixed seed."""
    torch.manual_seed(11)
    result = model(**batch(), output_hidden_states=True)
    return [result.loss, result.logits, *result.hidden_states]


def all_equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
