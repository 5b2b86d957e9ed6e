"""Causal attention that is told of no padding.

Before every forward pass transformers asks the device whether a batch has padding, or packed sequences, and waits for
the answer and so for everything that the device was given before: the optimizer's step of the step before, and all
that the host could have prepared meanwhile (LLaMA-7B on an H100: about 10 of 174 ms). Where batches are padded on the
right the answer does not matter: no token looks at what comes after it, and nothing is learned from padding itself.
Without a mask, attention also takes its fast kernels for padded batches.
"""

from __future__ import annotations

from typing import Any

from torch import nn

NAME = "salient_ds_causal"
"""Under this name transformers runs its own "sdpa", and makes no masks for it, since it does not know the name."""

MODEL_TYPES = ("gemma", "llama", "mistral", "opt", "qwen2", "qwen3")
"""Decoders whose attention is all there is to their mask."""


def leave_out_masks(model: nn.Module) -> bool:
    """Let a causal language model with attention "sdpa" go without masks where that is known to change nothing.

    Its batches must be padded on the right. Masks with four axes (packed sequences) are used as before.

    Returns:
        Whether it now does.
    """
    config: Any = model.config
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = layers == {"full_attention"} and getattr(config, "sliding_window", None) is None
    if config._attn_implementation != "sdpa" or config.model_type not in MODEL_TYPES or not plain:
        return False
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(NAME, sdpa_attention_forward)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return True
