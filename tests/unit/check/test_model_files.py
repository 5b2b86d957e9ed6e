"""Checkpoint directories: whole ones, damaged ones, and what is read off them."""

from __future__ import annotations

import json
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest

from salient_ds.check.model_files import ModelFiles, inspect_model
from salient_ds.check.model_shapes import derived_linear_shapes
from salient_ds.config.run import ModelConfig

LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
         "num_attention_heads": 2, "vocab_size": 16}  # fmt: skip


def inspect(path: Path | str, **options: Any) -> ModelFiles:
    return inspect_model(ModelConfig(path=str(path), **options))


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    """fp32 zeros under the given names."""
    table, offset = {}, 0
    for name, shape in tensors.items():
        size = 4
        for n in shape:
            size *= n
        table[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps({"__metadata__": {"format": "pt"}, **table}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(offset))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two shards with their index."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    parts = {
        "model-00001-of-00002.safetensors": {
            "model.embed_tokens.weight": (16, 8),
            "model.layers.10.self_attn.q_proj.weight": (8, 8),
            "model.layers.2.self_attn.q_proj.weight": (8, 8),
            "model.layers.2.input_layernorm.weight": (8,),
        },
        "model-00002-of-00002.safetensors": {
            "model.layers.2.mlp.down_proj.weight": (8, 12),
            "model.layers.2.mlp.down_proj.bias": (8,),
            "lm_head.weight": (16, 8),
        },
    }
    weight_map = {}
    for file, tensors in parts.items():
        write_safetensors(tmp_path / file, tensors)
        weight_map |= dict.fromkeys(tensors, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_a_real_checkpoint_is_read_without_complaint(tiny_llama: Path) -> None:
    import transformers

    found = inspect(tiny_llama)
    assert (found.problems, found.notes, found.weights) == ([], [], "safetensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    linear = {p: tuple(m.weight.shape) for p, m in model.named_modules() if type(m).__name__ == "Linear"}
    linear.pop("lm_head")
    assert derived_linear_shapes(found.config) == linear
    assert found.parameters() == model.num_parameters()


def test_a_truncated_shard_names_file_and_both_sizes(sharded: Path) -> None:
    shard = sharded / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-100])
    (problem,) = inspect(sharded).problems
    assert problem.startswith(str(shard))
    assert f"truncated: expected {len(data)} bytes, it has {len(data) - 100}" in problem


@pytest.mark.parametrize("left", [0, 5, 40])
def test_a_shard_cut_inside_its_header(sharded: Path, left: int) -> None:
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:left])
    (problem,) = inspect(sharded).problems
    assert "is truncated: expected more than" in problem and f"it has {left}" in problem


def test_trailing_bytes(sharded: Path) -> None:
    with (sharded / "model-00001-of-00002.safetensors").open("ab") as file:
        file.write(b"x")
    (problem,) = inspect(sharded).problems
    assert "is too long" in problem


def test_all_damage_is_listed(sharded: Path) -> None:
    (sharded / "model-00001-of-00002.safetensors").unlink()
    (sharded / "model-00002-of-00002.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid x")
    (sharded / "config.json").write_text("{")
    problems = "\n".join(inspect(sharded).problems)
    assert (
        "model-00001-of-00002.safetensors is missing: model.safetensors.index.json names it for 4 tensors" in problems
    )
    assert "is a git-lfs pointer" in problems
    assert "config.json cannot be read" in problems


def test_index_and_shard_of_different_versions(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.3.mlp.up_proj.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    (problem,) = inspect(sharded).problems
    assert "does not hold 'model.layers.3.mlp.up_proj.weight'" in problem


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": {}}'])
def test_a_broken_index(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(content)
    assert any("model.safetensors.index.json" in p for p in inspect(sharded).problems) or content == "[]"
    assert not inspect(sharded).tensors


@pytest.mark.parametrize("header", [b"not json", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [2]}}', b"[]"])
def test_a_header_that_is_no_table(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    (problem,) = inspect(tmp_path).problems
    assert "is not a safetensors file" in problem


def test_a_tensor_whose_bytes_do_not_fit_its_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [3, 4], "data_offsets": [0, 20]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(20))
    (problem,) = inspect(tmp_path).problems
    assert "tensor 'w' of shape (3, 4) and BF16 has 20 bytes" in problem


def test_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (problem,) = inspect(tmp_path).problems
    assert "holds no weights" in problem
    found = inspect(tmp_path, random_weights=True)
    assert not found.problems and not found.tensors


def test_bin_files_must_be_zip_archives(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    archive = tmp_path / "pytorch_model.bin"
    with zipfile.ZipFile(archive, "w") as out:
        out.writestr("archive/data.pkl", b"x" * 1000)
    found = inspect(tmp_path)
    assert not found.problems and found.weights == "bin" and "not checked" in found.notes[0]
    assert not found.tensors and found.parameters() is not None  # from config.json
    archive.write_bytes(archive.read_bytes()[:500])
    (problem,) = inspect(tmp_path).problems
    assert "pytorch_model.bin (500 bytes) is not readable as a torch file" in problem


def test_bin_index_with_a_missing_shard(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "x.bin", "b": "x.bin"}}))
    (problem,) = inspect(tmp_path).problems
    assert "x.bin is missing" in problem


def test_models_that_adapters_cannot_wrap(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"h.0.attn.c_attn.weight": (8, 24)})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "quantization_config": {}}))
    found = inspect(tmp_path)
    assert any("Conv1D" in p for p in found.problems) and any("quantised" in p for p in found.problems)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "a/b/c", "checkpoints/"])
def test_missing_directories(path: str) -> None:
    (problem,) = inspect(path).problems
    assert f"model.path='{path}' does not exist" in problem


def test_a_file_instead_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    (problem,) = inspect(tmp_path / "f").problems
    assert "is a file" in problem


def test_hub_names_are_looked_up_in_the_cache_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    found = inspect("someone/model")
    assert not found.problems and "it is downloaded when training starts" in found.notes[0]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in inspect("someone/model").problems[0]
    assert "neither a directory nor a hub name" in inspect("some one").problems[0]

    snapshot = tmp_path / "models--someone--model" / "snapshots" / ("0" * 40)
    shutil.copytree(tiny_llama, snapshot)
    refs = tmp_path / "models--someone--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path))
    found = inspect("someone/model")
    assert not found.problems and found.tensors and found.weights == "safetensors"
    (snapshot / "model.safetensors").unlink()
    found = inspect("someone/model")
    assert not found.problems and "not all in the hub cache" in found.notes[0]
    assert not found.tensors and found.parameters() is not None  # from config.json
