"""Count what a process puts into collectives, and compare it with the formulas of docs/communication.md."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed.comm as ds_comm
import torch
import torch.distributed as dist

from salient_ds.check.model_shapes import architecture
from salient_ds.check.report import MemoryInputs
from salient_ds.check.scale import Traffic, Work, work_of
from salient_ds.config.run import RunConfig
from salient_ds.ranks import RankLayout
from salient_ds.zero import sharded_base
from salient_ds.zero.ds_json import DsSummary

Log = list[tuple[str, int]]
"""Kind and bytes of each collective. "parameters" and "layer" are all-gathers: each process puts in its part."""
SUMS, GATHERS = ("all_reduce", "broadcast", "reduce"), ("parameters", "layer", "all_gather")


@contextlib.contextmanager
def counted() -> Iterator[Log]:
    """Every collective in the block, with the bytes that this process puts in."""
    log: Log = []
    backend = ds_comm.comm.cdb
    places = [(dist, name, name, 0) for name in SUMS]
    places += [
        (dist, "all_gather", "all_gather", 1),
        (sharded_base, "_all_gather", "layer", 1),
    ]
    if backend is not None:
        places.append((backend, "all_gather_function", "parameters", 1))
    before = [(owner, name, getattr(owner, name)) for owner, name, _, _ in places]
    try:
        for owner, name, kind, place in places:
            setattr(owner, name, _noting(log, kind, place, getattr(owner, name)))
        yield log
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def _noting(log: Log, kind: str, place: int, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        names = ("tensor", "input_tensor", "input")
        given = args[place] if len(args) > place else next(kwargs[n] for n in names if n in kwargs)
        log.append((kind, _bytes(given)))
        return function(*args, **kwargs)

    return call


def _bytes(value: Any) -> int:
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def as_traffic(log: Log, processes: int) -> Traffic:
    """A log in the terms of the model: sums, and the whole of what is gathered."""
    return Traffic(
        summed=sum(size for kind, size in log if kind in SUMS),
        gathered=sum(size * processes for kind, size in log if kind in GATHERS),
        calls=len(log),
    )


def sizes_of(run: RunConfig, layout: RankLayout, base_parameters: int, config: dict[str, Any], stage: int) -> Work:
    """The sizes that the formulas of bytes take: this config.json, and adapters with this layout."""
    inputs = MemoryInputs(base_parameters, layout, architecture(config), 0)
    return work_of(run, inputs, DsSummary(stage, False, False, True, True, 0, 0, 0))
