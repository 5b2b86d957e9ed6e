"""Writes the files of a checkpoint so that a whole one can be told from a damaged one."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.engine.shard_files import (
    FORMAT,
    MANIFEST,
    MANIFEST_SUM,
    checkpoint_dirs,
    find_checkpoints,
    manifest_sum,
    step_of,
)

PARTIAL = ".partial"
"""End of the name of a directory that is not a whole checkpoint yet, or not any more."""

Written = dict[str, dict[str, Any]]
"""Size ("bytes") and "sha256" of files by name, computed from what was in memory, not from what was read back."""

_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
           torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}  # fmt: skip
"""Names of data types in safetensors files."""


def make_folder(path: Path) -> bool:
    """Create a directory and those above it. Returns whether it is there."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        return True
    except OSError:
        return False


def write_file(path: Path, pieces: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Write a file to the disk, not only to the system's cache. Returns its entry in :data:`Written`."""
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as out:
        for piece in pieces:
            out.write(piece)
            digest.update(piece)
            size += len(piece)
        out.flush()
        os.fsync(out.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def tensor_pieces(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The content of a safetensors file, piece by piece.

    The library writes a file at once, for which it copies all tensors. Here one tensor at a time is on the CPU.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))  # aligned
    table, end = {}, 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        table[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8)
    yield struct.pack("<Q", len(header)) + header
    for _, tensor in ordered:
        flat = tensor.detach().cpu().contiguous().view(-1)
        yield flat.view(torch.uint8).numpy().data


def seal(partial: Path, final: Path, facts: dict[str, Any], reports: Iterable[Written]) -> str | None:
    """Write the manifest of the directory ``partial``, and rename the directory to ``final``.

    Args:
        facts: what the manifest holds besides the list of files.
        reports: what each process wrote.

    Returns:
        What went wrong; None: the checkpoint is whole.
    """
    try:
        files = {name: entry for report in reports for name, entry in sorted(report.items())}
        for name, entry in files.items():
            size = (partial / name).stat().st_size
            if size != entry["bytes"]:
                return f"{partial / name} has {size} bytes, {entry['bytes']} were written"
        content = json.dumps({"format": FORMAT, **facts, "files": files}, indent=1).encode()
        write_file(partial / MANIFEST, [content])
        write_file(partial / MANIFEST_SUM, [manifest_sum(content)])
        _sync_folder(partial)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _sync_folder(final.parent)
        return None
    except OSError as error:
        return str(error)


def _sync_folder(path: Path) -> None:
    """Make new and renamed entries of a directory survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_others(folder: Path, step: int, keep: int, spare: int | None = None) -> None:
    """Remove all checkpoints in ``folder`` but the last ``keep`` whole ones up to ``step`` and that of ``spare``.

    Each is renamed first, so that a removal that is interrupted leaves no checkpoint that looks damaged.
    """
    whole = [path for path in find_checkpoints(folder) if step_of(path) <= step]
    kept = whole[-keep:] + [path for path in whole if step_of(path) == spare]
    for path in checkpoint_dirs(folder):
        if path not in kept:
            with suppress(OSError):
                path.rename(path.with_name(f"{path.name}{PARTIAL}"))
    remove_debris(folder)


def remove_debris(folder: Path) -> None:
    """Remove what saves and removals that were interrupted have left in ``folder``."""
    for path in folder.glob(f"step-*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)
