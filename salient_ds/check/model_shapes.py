"""Shapes of a LLaMA-family model from its config.json, for checks and estimates without weights. No torch.

Shapes are (out features, in features), as in ``nn.Linear.weight``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# family -> defaults (key/value heads, head dimension) for a config.json without them; None = derived from other fields
_FAMILIES: dict[str, tuple[int | None, int | None]] = {
    "llama": (None, None),
    "mistral": (8, None),
    "qwen2": (32, None),
    "qwen3": (32, 128),
    "gemma": (16, 256),
    "gemma2": (4, 256),
    "gemma3_text": (4, 256),
}
_TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3_text")
_NORMS_PER_LAYER = {"gemma2": 4, "gemma3_text": 4}


@dataclass(frozen=True)
class Architecture:
    """The numbers of a decoder-only transformer that memory estimates need."""

    hidden_size: int
    intermediate_size: int
    layers: int
    vocab_size: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def kv_width(self) -> int:
        """Width of the keys (and of the values) of one token."""
        return self.kv_heads * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Parameters of the seven matrices of one layer."""
        attention = 2 * self.hidden_size * (self.heads * self.head_dim + self.kv_width)
        return attention + 3 * self.hidden_size * self.intermediate_size


def architecture(config: Mapping[str, Any]) -> Architecture | None:
    """Read the numbers from a config.json. None for another model family, or if a number is missing."""
    family = config.get("model_type")
    if family not in _FAMILIES:
        return None
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
    numbers = [number for field in fields if isinstance(number := config.get(field), int) and number > 0]
    if len(numbers) < len(fields):
        return None
    hidden, intermediate, layers, vocab, heads = numbers
    default_kv, default_dim = _FAMILIES[str(family)]
    return Architecture(
        hidden_size=hidden,
        intermediate_size=intermediate,
        layers=layers,
        vocab_size=vocab,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or default_kv or heads,
        head_dim=config.get("head_dim") or default_dim or hidden // heads,
    )


def derived_linear_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Module path -> (out, in) of every linear layer of a causal LLaMA-family model, in model order.

    Empty if :func:`architecture` does not know the family. The output embedding is left out.
    """
    arch = architecture(config)
    if arch is None:
        return {}
    hidden, inner, wide = arch.hidden_size, arch.intermediate_size, arch.heads * arch.head_dim
    layer = {
        "self_attn.q_proj": (wide, hidden),
        "self_attn.k_proj": (arch.kv_width, hidden),
        "self_attn.v_proj": (arch.kv_width, hidden),
        "self_attn.o_proj": (hidden, wide),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(arch.layers) for name, shape in layer.items()}


def derived_parameters(config: Mapping[str, Any]) -> int | None:
    """Number of parameters (elements) of the causal model: matrices, embeddings and norms. Biases are not counted."""
    arch = architecture(config)
    if arch is None:
        return None
    matrices = sum(out * inner for out, inner in derived_linear_shapes(config).values())
    family = config["model_type"]
    tied = config.get("tie_word_embeddings", family in _TIED_BY_DEFAULT)
    embeddings = arch.vocab_size * arch.hidden_size * (1 if tied else 2)
    norms = (_NORMS_PER_LAYER.get(family, 2) * arch.layers + 1) * arch.hidden_size
    return matrices + embeddings + norms
