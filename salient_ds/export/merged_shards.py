"""Writes one file of a merged checkpoint at a time.

As stored: a byte copy of the base file, in which only the tensors that change are overwritten, in place. A tensor keeps
its dtype and shape, so the header and the offsets of the safetensors file stay valid, and one matrix at a time is in
memory. In another dtype: the file is written anew, with one file in memory. Pickled ``.bin`` files are first converted
to safetensors, one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from salient_ds.export.base_files import load_bin
from salient_ds.export.fold import AdapterFactors, fold
from salient_ds.export.rounding import RoundingError, merge_matrix

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Changes:
    """What is different in the merged model."""

    adapters: Mapping[str, AdapterFactors]
    """By the name of the tensor on disk."""
    trained: Mapping[str, Tensor]
    """Parameters trained in full, by the name of the tensor on disk."""
    dtype: torch.dtype | None = None
    """Of all floating-point tensors; None: as stored."""
    rounding: RoundingError = field(default_factory=RoundingError)
    stored: set[torch.dtype] = field(default_factory=set)
    """Types in which merged matrices were written."""

    def concern(self, key: str) -> bool:
        """Whether the tensor ``key`` gets other values."""
        return key in self.trained or (key in self.adapters and self.adapters[key].rank > 0)

    def new_tensor(self, key: str, base: Tensor) -> Tensor | None:
        """What takes the place of ``base``; None if nothing does.

        Raises:
            ValueError: shapes differ, or values do not fit into the type.
        """
        dtype = self.dtype if self.dtype is not None and base.dtype in _DTYPES.values() else base.dtype
        if key in self.trained:
            new = self.trained[key].detach().cpu()
            if new.shape != base.shape:
                shapes = f"{list(base.shape)} in the base, {list(new.shape)} in the run"
                raise ValueError(f"{key!r} is {shapes}: wrong base model?")
            new = new.to(dtype)
        elif self.concern(key):
            new = self._merged(key, base, dtype)
        elif dtype != base.dtype:
            new = base.to(dtype)
        else:
            return None
        if not new.isfinite().all() and base.isfinite().all():
            raise ValueError(f"{key!r} overflows {dtype} after merging: convert the base to bfloat16 or float32 first")
        return new.contiguous()

    def _merged(self, key: str, base: Tensor, dtype: torch.dtype) -> Tensor:
        adapter = self.adapters[key]
        expected, found = [adapter.B.shape[0], adapter.A.shape[1]], list(base.shape)
        if found != expected:
            hint = "is this the model that was trained?"
            if found == expected[::-1]:
                hint = "it is stored transposed (Conv1D), which is not supported; adapt nn.Linear layers only"
            raise ValueError(f"adapter {adapter.name!r} is {expected}, its base weight {key!r} {found}: {hint}")
        pair = fold(adapter)
        assert pair is not None, "rank 0 was filtered out"
        self.stored.add(dtype)
        return merge_matrix(base, pair, dtype, self.rounding)


def write_shard(source: Path, destination: Path, keys: Sequence[str], changes: Changes) -> None:
    """Write the merged form of the file ``source``, which holds the tensors ``keys``.

    Raises:
        ValueError: the file is damaged, or see :meth:`Changes.new_tensor`.
    """
    copy_shard(source, destination)
    with destination.open("r+b") as shard:
        header, start = _checked_header(shard, keys)
        for key in filter(changes.concern, keys):
            _stored_dtype(header[key], key)
        if changes.dtype is None or {_DTYPES.get(header[key]["dtype"]) for key in keys} <= {changes.dtype, None}:
            _patch(shard, header, start, keys, changes)
            return
    _rewrite(destination, keys, changes)


def _patch(shard: BinaryIO, header: Mapping[str, Any], start: int, keys: Sequence[str], changes: Changes) -> None:
    """Overwrite the changed tensors of one safetensors file in place."""
    for key in filter(changes.concern, keys):
        begin, end = header[key]["data_offsets"]
        shard.seek(start + begin)
        data = torch.frombuffer(bytearray(shard.read(end - begin)), dtype=_stored_dtype(header[key], key))
        new = changes.new_tensor(key, data.reshape(header[key]["shape"]))
        if new is not None:
            shard.seek(start + begin)
            shard.write(new.reshape(-1).view(torch.uint8).numpy().data)


def _rewrite(path: Path, keys: Sequence[str], changes: Changes) -> None:
    """Write the file again, with all its floating-point tensors in another type."""
    tensors = {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        for key in keys:
            base = file.get_tensor(key)
            new = changes.new_tensor(key, base)
            tensors[key] = base if new is None else new
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata=metadata or {"format": "pt"})
    partial.replace(path)


def bytes_as(paths: Sequence[Path], dtype: torch.dtype | None) -> int:
    """Size of the files once their floating-point tensors have the type ``dtype`` (None: as they are)."""
    total = 0
    for path in paths:
        size = path.stat().st_size
        if dtype is not None and path.suffix == ".safetensors":
            with path.open("rb") as file:
                header, _ = read_header(file)
            for entry in header.values():
                old = _DTYPES.get(entry.get("dtype", ""))
                if old is not None:
                    begin, end = entry["data_offsets"]
                    size += (end - begin) * dtype.itemsize // old.itemsize - (end - begin)
        elif dtype is not None:
            size = size * dtype.itemsize // 2
        total += size
    return total


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file (name -> dtype, shape, data_offsets), and the position where its data starts.

    Raises:
        ValueError: the file ends inside its header.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    content = file.read(length)
    if len(content) < length or not length:
        raise ValueError("a base shard is truncated inside its header: fetch it again")
    return dict(json.loads(content)), 8 + length


def _checked_header(shard: BinaryIO, keys: Sequence[str]) -> tuple[dict[str, Any], int]:
    header, start = read_header(shard)
    lost = [key for key in keys if key not in header]
    if lost:
        raise ValueError(f"the index of the base checkpoint names tensors that their file lacks, e.g. {lost[0]!r}")
    expected = start + max((header[key]["data_offsets"][1] for key in keys), default=0)
    size = shard.seek(0, 2)
    if size < expected:
        raise ValueError(f"the base shard with {keys[0]!r} is truncated, {size} bytes of {expected}: fetch it again")
    return header, start


def _stored_dtype(entry: Mapping[str, Any], key: str) -> torch.dtype:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(
            f"base weight {key!r} is stored as {entry['dtype']}: merging needs one of {', '.join(_DTYPES)}, "
            "not a quantised base; export as peft instead"
        )
    return _DTYPES[entry["dtype"]]


def copy_shard(source: Path, destination: Path) -> None:
    """Copy a safetensors file as it is, or convert a pickled one. Tied tensors are written once per name."""
    if source.suffix == ".safetensors":
        shutil.copyfile(source, destination)
        return
    tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in load_bin(source).items()}
    save_file(tensors, destination, metadata={"format": "pt"})
