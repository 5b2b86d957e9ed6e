"""Writes a safetensors file tensor by tensor, so that one of them is in memory at a time.

The library's own ``save_file`` wants all tensors at once. The format allows more: it begins with the names, types,
shapes and places of all tensors, which are known before their values (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
"""Names of types in safetensors files."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def in_file_order(entries: Iterable[Entry]) -> list[Entry]:
    """Wide types first, otherwise as given. So every tensor starts at a multiple of its element size."""
    return sorted(entries, key=lambda entry: -entry.dtype.itemsize)


def write_streamed(path: Path, entries: Sequence[Entry], tensors: Iterable[Tensor]) -> None:
    """Write a safetensors file. ``tensors`` is asked for the next tensor when the last one has been written.

    Args:
        entries: what the file holds, in the order of :func:`in_file_order`.
        tensors: the values of the entries, in the same order.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    place = 0
    for entry in entries:
        offsets = [place, place := place + entry.size]
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
    content = json.dumps(header, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with path.open("wb") as file:
        file.write(len(content).to_bytes(8, "little"))
        file.write(content)
        for entry, tensor in zip(entries, tensors, strict=True):
            assert tensor.dtype == entry.dtype and tuple(tensor.shape) == entry.shape, entry
            if tensor.numel():
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
