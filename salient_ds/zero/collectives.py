"""The few collectives an allocation needs, each packed into one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from salient_ds.ranks import WorkShare


class World(NamedTuple):
    """The number of this data-parallel process, and how many there are."""

    global_rank: int
    world_size: int


def world() -> World:
    """Number of this process and number of processes; (0, 1) without a process group."""
    return World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World(0, 1)


def packed_sum(tensors: dict[str, Tensor], contribute: bool, device: torch.device) -> dict[str, Tensor]:
    """Sum each tensor over all processes with ONE all-reduce, in the widest dtype among them (fp32 or fp64).

    Args:
        tensors: the same names and shapes on every process.
        contribute: False counts this process' values as zeros, so that replicated statistics are counted only once.
    """
    if not tensors:
        return {}
    names = sorted(tensors)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors.values()) else torch.float32
    flat = torch.cat([tensors[n].reshape(-1).to(device, dtype) for n in names])
    if not contribute:
        flat.zero_()
    if world().world_size > 1:
        dist.all_reduce(flat)
    pieces = flat.split([tensors[n].numel() for n in names])
    return {n: p.view(tensors[n].shape) for n, p in zip(names, pieces, strict=True)}


def share_of_work() -> WorkShare:
    """This process' share of work that is divided over all processes."""
    here = world()
    return WorkShare(here.global_rank, here.world_size, dist.all_reduce)


def average(tensor: Tensor) -> None:
    """Mean over all processes, in place."""
    world_size = world().world_size
    if world_size > 1:
        dist.all_reduce(tensor)
        tensor.div_(world_size)


def all_equal(digest: str, device: torch.device) -> bool:
    """Whether every process holds the same hexadecimal digest (one small all-gather)."""
    world_size = world().world_size
    if world_size == 1:
        return True
    mine = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8, device=device)
    gathered = [torch.empty_like(mine) for _ in range(world_size)]
    dist.all_gather(gathered, mine)
    return all(torch.equal(mine, other) for other in gathered)


def sum_numbers(values: list[float], device: torch.device) -> list[float]:
    """Sum a few numbers over all processes (fp64, one all-reduce)."""
    packed = torch.tensor(values, dtype=torch.float64, device=device)
    if world().world_size > 1:
        dist.all_reduce(packed)
    return [float(v) for v in packed]


def all_succeeded(ok: bool, device: torch.device) -> bool:
    """Whether every process reports success. All get the same answer, so that none waits for one that failed."""
    return sum_numbers([0.0 if ok else 1.0], device)[0] == 0.0


def from_everyone(value: Any) -> list[Any]:
    """The ``value`` of every process, by global rank. Values are pickled, so they should be small."""
    world_size = world().world_size
    found = [value]
    if world_size > 1:
        found = [None] * world_size
        dist.all_gather_object(found, value)
    return found


def to_main(value: Any) -> list[Any] | None:
    """The ``value`` of every process, by global rank, on the main process; None on the others. Values are pickled."""
    here = world()
    if here.world_size == 1:
        return [value]
    found: list[Any] | None = [None] * here.world_size if here.global_rank == 0 else None
    dist.gather_object(value, found)
    return found


def from_main(values: list[Any], device: torch.device) -> list[Any]:
    """The ``values`` of the main process, on every process. They are pickled, so they should be small."""
    if world().world_size > 1:
        dist.broadcast_object_list(values, src=0, device=device)
    return values
