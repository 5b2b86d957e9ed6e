"""The fingerprint of base weights: the same for the same tensors in any files, another after any training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from salient_ds.config.run import ModelConfig
from salient_ds.models import fingerprint
from salient_ds.models.fingerprint import base_identity, weights_fingerprint


@pytest.fixture
def base(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, its weights in one file."""
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    tensors = {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def rewrite(base: Path, change: str, row: int, column: int) -> str | None:
    """The fingerprint after one element of one tensor has changed."""
    tensors = load_file(base / "model.safetensors")
    tensors[change][row, column] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return weights_fingerprint(base)


def test_the_same_tensors_have_the_same_fingerprint(base: Path, tmp_path: Path) -> None:
    expected = weights_fingerprint(base)
    assert expected is not None and len(expected) == 32
    moved = base.rename(tmp_path / "moved")
    assert weights_fingerprint(moved) == expected
    tensors = load_file(moved / "model.safetensors")
    names = sorted(tensors)
    where = {}
    for index, part in enumerate((names[::2], names[1::2])):
        file = f"model-{index}.safetensors"
        save_file({name: tensors[name] for name in part}, moved / file)
        where |= dict.fromkeys(part, file)
    (moved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    assert weights_fingerprint(moved) == expected
    (moved / "model.safetensors").unlink()
    assert weights_fingerprint(moved) == expected
    (moved / "model-1.safetensors").unlink()
    assert weights_fingerprint(moved) is None  # still to be downloaded


@pytest.mark.parametrize("place", [(0, 0), (-1, -1)])
def test_another_element_gives_another_fingerprint(base: Path, place: tuple[int, int]) -> None:
    expected = weights_fingerprint(base)
    assert rewrite(base, "model.layers.1.self_attn.q_proj.weight", *place) != expected


def test_every_tensor_is_sampled_at_its_start_middle_and_end(tmp_path: Path) -> None:
    big = torch.zeros(100 * fingerprint.BLOCK, dtype=torch.uint8)
    found = set()
    for place in (None, 0, fingerprint.BLOCK - 1, 50 * fingerprint.BLOCK, len(big) - 1):
        changed = big.clone()
        if place is not None:
            changed[place] = 1
        save_file({"small": torch.ones(3), "big": changed}, tmp_path / "model.safetensors")
        found.add(weights_fingerprint(tmp_path))
    assert len(found) == 5
    save_file({"small": torch.ones(3), "big": big.view(100, -1)}, tmp_path / "model.safetensors")
    assert weights_fingerprint(tmp_path) not in found  # another shape


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_weights(tmp_path: Path, new_format: bool) -> None:
    found = []
    for value in (0.0, 1.0):
        weights = {"w": torch.full((50, 50), value)}
        torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
        found += [weights_fingerprint(tmp_path), weights_fingerprint(tmp_path)]
    assert found[0] == found[1] != found[2] == found[3]


def test_a_damaged_file_is_named(base: Path) -> None:
    (base / "model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(OSError, match="model.safetensors is not a file of weights"):
        weights_fingerprint(base)


def test_random_weights_and_configuration(base: Path) -> None:
    model = ModelConfig(path=str(base), random_weights=True)
    first, other = base_identity(model, 1), base_identity(model, 2)
    assert first["base weights"] != other["base weights"] and first["config.json"] == other["config.json"]
    assert first["config.json"]["hidden_size"] and "transformers_version" not in first["config.json"]
    assert base_identity(ModelConfig(path=str(base)), 1) == base_identity(ModelConfig(path=str(base)), 2)


def test_a_hub_name_stands_for_its_snapshot(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def cached(name: str, file: str, revision: str | None) -> str | None:
        asked.append((name, file, revision))
        return str(base / file) if name == "org/here" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert base_identity(ModelConfig(path="org/here", revision="v2"), 0) == base_identity(
        ModelConfig(path=str(base)), 0
    )
    assert base_identity(ModelConfig(path="org/absent"), 0) == {}
    assert asked == [("org/here", "config.json", "v2"), ("org/absent", "config.json", None)]
