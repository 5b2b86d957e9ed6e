"""A GGUF file becomes a directory that transformers loads as any other checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

gguf = pytest.importorskip("gguf", reason="needs the demo's dependencies")

HIDDEN, HEADS, LAYERS, WIDE = 32, 4, 2, 64
WORDS = ["<unk>", "<|im_start|>", "<|im_end|>", *map(chr, range(97, 123)), "Ġ", "Ċ", "he", "at"]


def write_gguf(path: Path) -> dict[str, Any]:
    """A random LLaMA with a byte-level tokenizer; returns some of its weights."""
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["h e", "a t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    shapes = {"token_embd": (len(WORDS), HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {f"blk.{i}.{name}": (HIDDEN, HIDDEN) for name in ("attn_q", "attn_k", "attn_v", "attn_output")}
        shapes |= {f"blk.{i}.{name}": (WIDE, HIDDEN) for name in ("ffn_gate", "ffn_up")}
        shapes |= {f"blk.{i}.ffn_down": (HIDDEN, WIDE)}
        shapes |= {f"blk.{i}.{name}": (HIDDEN,) for name in ("attn_norm", "ffn_norm")}
    weights = {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    for name, values in weights.items():
        writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_the_directory_is_an_ordinary_checkpoint_with_the_same_weights(tmp_path: Path) -> None:
    import convert
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = write_gguf(tmp_path / "model.gguf")
    target = convert.to_hugging_face(tmp_path / "model.gguf", tmp_path / "model")
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    assert not list(tmp_path.glob("*.partial"))

    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    for name, key in (("blk.1.ffn_down", "model.layers.1.mlp.down_proj"), ("token_embd", "model.embed_tokens")):
        expected = torch.from_numpy(weights[name]).to(torch.bfloat16).float()
        assert torch.equal(model.get_submodule(key).weight, expected)
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer("heat", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["he", "at"]
    assert model(input_ids=torch.tensor([ids])).logits.shape == (1, 2, len(WORDS))


def test_a_directory_that_is_there_is_kept(tmp_path: Path) -> None:
    import convert

    (tmp_path / "model").mkdir()
    (tmp_path / "model" / convert.WEIGHTS).write_bytes(b"mine")
    assert convert.to_hugging_face(tmp_path / "missing.gguf", tmp_path / "model") == tmp_path / "model"
    assert (tmp_path / "model" / convert.WEIGHTS).read_bytes() == b"mine"
