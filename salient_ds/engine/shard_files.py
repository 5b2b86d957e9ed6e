"""Reads the files of a checkpoint without DeepSpeed or a process group."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from salient_ds.ranks import Part

FORMAT = 1
STEP_DIR = re.compile(r"step-(\d{8})$")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read. The message says what is left and what to do."""


def find_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints in ``folder``, oldest first. Damaged ones are left out."""
    if not folder.is_dir():
        return []
    named = sorted(p for p in folder.iterdir() if STEP_DIR.match(p.name))
    return [p for p in named if damage(p) is None]


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint directory; None if every file of the manifest is there with the listed size."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, size in manifest["files"].items():
            actual = (path / name).stat().st_size
            if actual != size:
                return f"{path / name} has {actual} bytes, {size} were written"
    except (OSError, ValueError, KeyError) as error:
        return f"{path}: {error}"
    return None


def shard_key(statistic: str, owner: str, lo: int) -> str:
    """Name of a tensor in a shard file: what it is, whose it is, and its first element."""
    return f"{statistic}|{owner}|{lo}"


def part_name(part: Part) -> str:
    """The owner of a method's statistic in :func:`shard_key`: matrix and factor."""
    return f"{part.module}.{part.factor}"


class ShardReader:
    """Reads any range of any saved tensor, however it was sharded when it was saved.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        problem = damage(path)
        if problem:
            raise CheckpointError(f"damaged checkpoint: {problem}; remove {path} and resume from an older one")
        self.manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
        self._handles = [safe_open(p, "pt") for p in sorted(path.glob("shard-*.safetensors"))]
        self._pieces: dict[tuple[str, str], list[tuple[int, int, int, str]]] = {}
        for index, handle in enumerate(self._handles):
            for key in handle.keys():  # noqa: SIM118 - not a dict
                statistic, owner, lo = key.split("|")
                numel = handle.get_slice(key).get_shape()[-1]
                self._pieces.setdefault((statistic, owner), []).append((int(lo), numel, index, key))

    def shared(self) -> dict[str, Any]:
        """The state that was equal on all processes."""
        loaded: dict[str, Any] = torch.load(self.path / "shared.pt", weights_only=True)
        return loaded

    def process(self, global_rank: int) -> dict[str, Any]:
        """The state of one process: its random state."""
        loaded: dict[str, Any] = torch.load(self.path / f"process-{global_rank:05d}.pt", weights_only=True)
        return loaded

    def read(self, statistic: str, owner: str, lo: int, numel: int) -> Tensor:
        """Elements [lo, lo + numel) of the last axis, in shape (..., numel).

        Raises:
            CheckpointError: no file holds some of the elements.
        """
        if numel == 0:
            return torch.zeros(0)  # no file holds a matrix that a compaction left without rows
        out: Tensor | None = None
        missing = numel
        for first, count, index, key in self._pieces.get((statistic, owner), []):
            a, b = max(first, lo), min(first + count, lo + numel)
            if a >= b:
                continue
            piece = self._handles[index].get_slice(key)[..., a - first : b - first]
            if out is None:
                out = torch.zeros(*piece.shape[:-1], numel, dtype=piece.dtype)
            out[..., a - lo : b - lo] = piece
            missing -= b - a
        if out is None or missing:
            raise CheckpointError(f"{self.path} lacks {missing} of {numel} elements of {statistic} of {owner}")
        return out

    def read_part(self, statistic: str, part: Part) -> Tensor:
        """A method's statistic for exactly the elements of ``part``, in shape (..., numel)."""
        return self.read(statistic, part_name(part), part.lo, part.numel)
