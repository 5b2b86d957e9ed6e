"""Causal attention without masks for padding.

Before every forward pass, transformers asks the device whether the batch has padding or packed sequences. The host then
waits until the device has done everything queued before, including the previous optimizer step, and prepares nothing
meanwhile (LLaMA-7B on an H100: some 5 of 174 ms). If batches are padded on the right, the answer does not matter: no
token attends to what comes after it, and nothing is learned from padding itself. Without a mask, attention can use its
fast kernels for padded batches as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NAME = "salient_ds_causal"
"""A second name for transformers' own "sdpa". transformers does not know the name, and so makes no masks for it."""

MODEL_TYPES = ("gemma", "llama", "mistral", "opt", "qwen2", "qwen3")
"""Decoders that need their mask for attention only."""


def leave_out_masks(model: nn.Module, device: torch.device) -> bool:
    """Make a causal language model with attention "sdpa" run without masks, if that is known to change nothing.

    Afterwards, the model is only for training and evaluation on batches that are padded on the right. Padding on the
    left, and position_ids that restart, are no longer noticed: never for runs that pack examples.

    Returns:
        Whether the model now runs without masks.
    """
    config: Any = model.config
    if config._attn_implementation != "sdpa" or not plainly_causal(model, config):
        return False
    if device.type == "cuda" and model.dtype == torch.float32 and _grouped(config):
        # without a mask transformers leaves grouped heads to the kernel, and fast kernels for fp32 do not support them
        return False
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(NAME, sdpa_attention_forward)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return bool(config._attn_implementation == NAME)


def plainly_causal(model: nn.Module, config: Any) -> bool:
    """Whether in every layer each token attends to itself and to all tokens before it, in model code that we know."""
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
    """Whether several heads share keys and values (grouped-query attention)."""
    return getattr(config, "num_key_value_heads", None) not in (None, config.num_attention_heads)
