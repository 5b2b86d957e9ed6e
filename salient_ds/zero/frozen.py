"""Frozen weights that have changed: by bad memory, a kernel that wrote too far, a library that trained them.

Every process keeps one sum per frozen tensor, over its bytes taken as whole numbers. Any single change alters it, and
it takes one pass over the memory. What others hold of a partitioned base is their own to check.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

from salient_ds.zero.internals.partitioned import own_partition

PART = "salient_ds_part"
"""Attribute of a layer whose parameters are views that change: a function. It returns what is kept, and their ids."""


class FrozenWeights:
    """The frozen parameters of a model, as they were when this object was made."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._sums = sums(model)

    def changed(self) -> str | None:
        """What has changed since, as a clause; None if nothing has. Any thread may call it."""
        now = sums(self._model)
        names = [name for name, value in self._sums.items() if now.get(name) != value]
        if not names:
            return None
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        return f"the frozen weights {names[0]}{more} are not what they were at the start"

    def digest(self) -> str:
        """A digest of those that every process holds whole (hexadecimal)."""
        whole = {name: value for name, value in self._sums.items() if not name.startswith("part of ")}
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


@torch.no_grad()
def sums(model: nn.Module) -> dict[str, int]:
    """A sum for every frozen tensor of this process, by name; parts of partitioned ones begin with "part of"."""
    found = {name: _sum(tensor) for name, tensor in _held(model).items() if tensor.numel()}
    return {name: int(value) for name, value in found.items()}


def _held(model: nn.Module) -> dict[str, Tensor]:
    held: dict[str, Tensor] = {}
    views: set[int] = set()
    for path, module in model.named_modules():
        part: Any = getattr(module, PART, None)
        if part is not None:
            kept, ids = part()
            held[f"part of {path}"] = kept
            views |= ids
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or id(parameter) in views or ".lora_" in name:
            continue
        own = own_partition(parameter)
        held[name if own is None else f"part of {name}"] = parameter.data if own is None else own
    return held


def _sum(tensor: Tensor) -> Tensor:
    """The bytes of a tensor as whole numbers, summed modulo 2^64."""
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    for dtype in (torch.int64, torch.int32, torch.int16):
        if flat.numel() % dtype.itemsize == 0 and flat.data_ptr() % dtype.itemsize == 0:
            return flat.view(dtype).sum(dtype=torch.int64)
    return flat.sum(dtype=torch.int64)
