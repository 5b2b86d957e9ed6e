"""Model shapes that are timed with random weights, with the usual settings for each. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A model's config.json, and the command-line defaults for it."""

    name: str
    config: dict[str, Any]
    ranks: tuple[int, ...]
    target_rank: int
    """Mean rank per matrix at which a shortened allocation schedule ends."""
    batch: int
    """Sequences per process and step."""
    seq: int
    """Tokens per sequence."""

    @property
    def layers(self) -> int:
        return int(self.config["num_hidden_layers"])


def _llama(hidden: int, inner: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "vocab_size": vocab, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


SHAPES = {
    "llama-7b": Shape("llama-7b", _llama(4096, 11008, 32, 32, 32000), (64, 480), 64, 4, 512),
    "llama-13b": Shape("llama-13b", _llama(5120, 13824, 40, 40, 32000), (64, 480), 64, 4, 512),
    "tiny": Shape("tiny", _llama(64, 160, 2, 4, 512), (4, 16), 4, 4, 64),
}


def find_shape(name: str) -> Shape:
    """Find a shape by name in :data:`SHAPES`, or read it from a checkpoint directory.

    Only config.json of the directory is read, never its weights.

    Raises:
        ValueError: ``name`` is neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    file = Path(name) / "config.json"
    if not file.is_file():
        raise ValueError(f"--shape {name!r} is neither one of {', '.join(SHAPES)} nor a directory with a config.json")
    return Shape(Path(name).resolve().name, json.loads(file.read_text()), (64, 480), 64, 4, 512)
