"""Causal attention that is told of no padding.

Before every forward pass transformers asks the device whether a batch has padding, or packed sequences, and waits for
the answer and so for everything that the device was given before: the optimizer's step of the step before, and all
that the host could have prepared meanwhile (LLaMA-7B on an H100: some 5 of 174 ms). Where batches are padded on the
right the answer does not matter: no token looks at what comes after it, and nothing is learned from padding itself.
Without a mask, attention also takes its fast kernels for padded batches.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NAME = "salient_ds_causal"
"""Under this name transformers runs its own "sdpa", and makes no masks for it, since it does not know the name."""

MODEL_TYPES = ("gemma", "llama", "mistral", "opt", "qwen2", "qwen3")
"""Decoders whose attention is all there is to their mask."""


def leave_out_masks(model: nn.Module, device: torch.device) -> bool:
    """Let a causal language model with attention "sdpa" go without masks where that is known to change nothing.

    From then on the model is for training and evaluation on batches that are padded on the right. Masks with four axes
    (packed sequences) are used as before; position_ids that start again are not looked at, nor is padding on the left.

    Returns:
        Whether it now does.
    """
    config: Any = model.config
    if config._attn_implementation != "sdpa" or not _plainly_causal(model, config):
        return False
    if device.type == "cuda" and model.dtype == torch.float32 and _grouped(config):
        return False  # without a mask transformers leaves grouping to kernels, and the fast ones for fp32 know none
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(NAME, sdpa_attention_forward)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return bool(config._attn_implementation == NAME)


def _plainly_causal(model: nn.Module, config: Any) -> bool:
    """Every token of every layer looks at itself and all before it, and the code is one that is known."""
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        config.model_type in MODEL_TYPES
        and type(model).__module__.startswith("transformers.")
        and layers == {"full_attention"}
        and getattr(config, "sliding_window", None) is None
        and getattr(config, "is_causal", True)
        and not getattr(config, "use_bidirectional_attention", False)
    )


def _grouped(config: Any) -> bool:
    """Several heads share keys and values."""
    return getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
