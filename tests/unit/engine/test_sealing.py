"""Files of a checkpoint as the libraries that read them see them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file

from salient_ds.engine.sealing import remove_others, seal, tensor_pieces, write_file
from salient_ds.engine.shard_files import damage, find_checkpoints, step_of

TENSORS = {
    "bool": torch.tensor([True, False, True]),
    "master|m.lora_A|0": torch.randn(7),
    "half": torch.randn(3, 5).to(torch.bfloat16),
    "empty": torch.zeros(0),
    "number": torch.tensor(3.5, dtype=torch.float64),
    "transposed": torch.arange(12).view(3, 4).T,
    "bytes": torch.arange(5, dtype=torch.uint8),
    "sixteen": torch.randn(9).half(),
}


def test_safetensors_reads_what_is_written_piece_by_piece(tmp_path: Path) -> None:
    path = tmp_path / "shard.safetensors"
    entry = write_file(path, tensor_pieces(TENSORS))
    content = path.read_bytes()
    assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[key], value) and found[key].dtype == value.dtype for key, value in TENSORS.items())
    write_file(path, tensor_pieces({}))
    assert load_file(path) == {}


def sealed(folder: Path, step: int) -> Path:
    partial, final = folder / f"step-{step:08d}.partial", folder / f"step-{step:08d}"
    partial.mkdir(parents=True)
    written = {"shared.pt": write_file(partial / "shared.pt", [b"content"])}
    assert seal(partial, final, {"step": step}, [written]) is None
    return final


def test_a_file_that_lost_bytes_is_not_sealed(tmp_path: Path) -> None:
    partial = tmp_path / "step-00000001.partial"
    partial.mkdir()
    written = {"shared.pt": write_file(partial / "shared.pt", [b"content"])}
    (partial / "shared.pt").write_bytes(b"cont")
    problem = seal(partial, tmp_path / "step-00000001", {"step": 1}, [written])
    assert problem is not None and problem.endswith("has 4 bytes, 7 were written") and partial.is_dir()


def test_only_the_last_whole_checkpoints_up_to_the_step_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 6, 8, 10):
        sealed(tmp_path, step)
    (tmp_path / "step-00000006" / "shared.pt").unlink()
    assert [step_of(path) for path in find_checkpoints(tmp_path)] == [2, 4, 8, 10]
    remove_others(tmp_path, 8, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000008"]
    assert damage(tmp_path / "step-00000008", contents=True) is None
