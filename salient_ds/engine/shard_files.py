"""Reads the files of a checkpoint without DeepSpeed or a process group, and tells whole ones from damaged ones.

``manifest.json`` lists every file with its size and sha256 (format 2; format 1 lists sizes only). The manifest's own
sha256 is in ``manifest.json.sha256``, in the form that ``sha256sum --check`` reads.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from salient_ds.host import file_sha256
from salient_ds.ranks import Part
from salient_ds.strict import Reported

FORMAT = 2
STEP_DIR = re.compile(r"step-(\d{8})$")
MANIFEST, MANIFEST_SUM = "manifest.json", "manifest.json.sha256"


class CheckpointError(RuntimeError, Reported):
    """A checkpoint cannot be written or read. The message says what is left and what to do."""


def checkpoint_dirs(folder: Path) -> list[Path]:
    """All checkpoints in ``folder`` that were once whole, oldest first. Some may be damaged now."""
    return sorted(p for p in folder.iterdir() if STEP_DIR.match(p.name)) if folder.is_dir() else []


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in ``folder`` whose files all have the right size, oldest first. Contents are not read."""
    return [p for p in checkpoint_dirs(folder) if damage(p) is None]


def choose_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The last whole checkpoint in ``folder``, contents verified; None if there is none at all.

    Args:
        say: is told which later ones are damaged, and how.

    Raises:
        CheckpointError: there are only damaged ones.
    """
    problems = []
    for path in reversed(checkpoint_dirs(folder)):
        problem = damage(path, contents=True)
        if problem is None:
            return path
        say(f"checkpoint {path} is damaged ({problem}): looking for the one before it")
        problems.append(problem)
    if problems:
        raise CheckpointError(
            f"all {len(problems)} checkpoints in {folder} are damaged (the last one: {problems[0]}): restore the "
            "files, or begin again with --overwrite"
        )
    return None


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint directory."""
    match = STEP_DIR.match(path.name)
    assert match is not None, f"{path} is not named step-N"
    return int(match.group(1))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint directory.

    Raises:
        CheckpointError: it is missing, differs from its sha256, or has a format that this version does not know.
    """
    place = path / MANIFEST
    try:
        content = place.read_bytes()
        manifest: dict[str, Any] = json.loads(content)
        version = manifest.get("format", 1)
        has_sum = version != 1 or (path / MANIFEST_SUM).exists()
        if has_sum and (path / MANIFEST_SUM).read_bytes() != manifest_sum(content):
            raise CheckpointError(f"{place} does not have the sha256 that {MANIFEST_SUM} states")
        if version not in (1, FORMAT):
            raise CheckpointError(
                f"{place} has format {version}, and this version of salient_ds reads 1 to {FORMAT}: use the version "
                "that wrote it"
            )
    except FileNotFoundError as error:
        raise CheckpointError(f"{error.filename} is missing") from error
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{place} cannot be read ({error})") from error
    except RecursionError as error:
        raise CheckpointError(f"{place} cannot be read (it is nested too deeply)") from error
    return manifest


def manifest_sum(content: bytes) -> bytes:
    """What ``manifest.json.sha256`` holds for a manifest of this ``content``."""
    return f"{hashlib.sha256(content).hexdigest()}  {MANIFEST}\n".encode()


def damage(path: Path, contents: bool = False, share: tuple[int, int] = (0, 1)) -> str | None:
    """What is wrong with a checkpoint directory; None if it is whole.

    Args:
        contents: compare the sha256 of files, too. That reads them completely, several at a time.
        share: (k, n) reads the contents of every n-th file only, from the k-th one on.
    """
    try:
        manifest = read_manifest(path)
        files = {name: entry if isinstance(entry, dict) else {"bytes": entry}
                 for name, entry in manifest["files"].items()}  # fmt: skip
        for name, entry in files.items():
            actual = (path / name).stat().st_size
            if actual != entry["bytes"]:
                return f"{path / name} has {actual} bytes, {entry['bytes']} were written"
        summed = [name for name in sorted(files) if contents and "sha256" in files[name]]
        mine = summed[share[0] :: share[1]]
        for name, found in zip(mine, _sums([path / name for name in mine]), strict=True):
            if found != files[name]["sha256"]:
                return f"{path / name} does not have the sha256 that {MANIFEST} states"
    except CheckpointError as error:
        return str(error)
    except FileNotFoundError as error:
        return f"{error.filename} is missing"
    except (OSError, KeyError, TypeError, AttributeError) as error:
        return f"{path} cannot be read ({error!r})"
    return None


def _sums(paths: Sequence[Path]) -> list[str]:
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:
        return list(pool.map(file_sha256, paths))


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

    def __init__(self, path: Path, contents: bool = True) -> None:
        """
        Args:
            contents: compare the sha256 of every file. Leave it out only if that has been done.
        """
        self.path = path
        problem = damage(path, contents)
        if problem:
            raise CheckpointError(f"damaged checkpoint: {problem}; take an older one, or restore the file")
        self.manifest = read_manifest(path)
        self._pieces: dict[tuple[str, str], list[tuple[int, int, int, str]]] = {}
        self._handles = []
        for place in [path / name for name in sorted(self.manifest["files"]) if name.endswith(".safetensors")]:
            try:
                handle = safe_open(place, "pt")
                self._index(handle)
            except Exception as error:  # safetensors has its own error type
                raise self._unreadable(place, error) from error
            self._handles.append(handle)

    def _index(self, handle: Any) -> None:
        for key in handle.keys():  # noqa: SIM118 - not a dict
            statistic, owner, lo = key.split("|")
            numel = handle.get_slice(key).get_shape()[-1]
            self._pieces.setdefault((statistic, owner), []).append((int(lo), numel, len(self._handles), key))

    @staticmethod
    def _unreadable(place: Path, error: Exception) -> CheckpointError:
        reason = str(error).partition("\n")[0]
        return CheckpointError(
            f"damaged checkpoint: {place} cannot be read ({reason}); take an older one with --resume"
        )

    def shared(self) -> dict[str, Any]:
        """The state that was equal on all processes."""
        return self._load("shared.pt")

    def process(self, global_rank: int) -> dict[str, Any]:
        """The state of one process: its random state."""
        return self._load(f"process-{global_rank:05d}.pt")

    def _load(self, name: str) -> dict[str, Any]:
        try:
            loaded: dict[str, Any] = torch.load(self.path / name, weights_only=True)
        except Exception as error:  # torch raises errors of many types for files that are not its own
            raise self._unreadable(self.path / name, error) from error
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
