"""Counts what a step sends: every collective of torch.distributed, with the bytes that this process puts in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.comm as ds_comm
import torch
import torch.distributed as dist

from salient_ds.zero import sharded_base
from tests.dist import scenario
from tests.dist.heterolora_worker import DATA
from tests.dist.scenario import Case

Traffic = list[tuple[str, int]]
"""Kind and bytes of each collective."""


def _bytes(value: Any) -> int:
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, (list, tuple)) else 0


def _counted(log: Traffic, kind: str, place: int, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        names = ("tensor", "input_tensor", "input")
        given = args[place] if len(args) > place else next(kwargs[n] for n in names if n in kwargs)
        log.append((kind, _bytes(given)))
        return function(*args, **kwargs)

    return call


def steps(global_rank: int, world_size: int, model: Path, cases: dict[str, Case]) -> dict[str, Any]:
    """By case: trainable elements at the end, padded elements of the optimizer's groups, the traffic of every step, and
    what the method's options say of it."""
    log: Traffic = []
    for name in ("all_reduce", "broadcast", "reduce"):
        setattr(dist, name, _counted(log, name, 0, getattr(dist, name)))
    dist.all_gather = _counted(log, "all_gather", 1, dist.all_gather)
    backend = ds_comm.comm.cdb
    backend.all_gather_function = _counted(log, "parameters", 1, backend.all_gather_function)
    sharded_base._all_gather = _counted(log, "layer", 1, sharded_base._all_gather)
    found = {}
    for name, case in cases.items():
        engine = scenario.build(case, model, world_size, probe_data=DATA)
        rows, before = [], _elements(engine)
        config = case.config(model)
        said = {
            "event": config.method.event_traffic(engine.adapted.layout, before),
            "step": config.method.step_traffic(engine.adapted.layout, scenario.GLOBAL_BATCH // world_size),
        }
        while engine.step < (case.steps if case.speed.get("compaction") == "last" else 9):
            log.clear()
            report = engine.train_step(*scenario.batches(engine.step, global_rank, world_size))
            rows.append((report.event is not None, sorted(log)))
        found[name] = {
            "elements": _elements(engine), "before": before, "rows": rows, "groups": _padded(engine), "said": said,
        }  # fmt: skip
        engine.engine.destroy()
    return found


def _elements(engine: Any) -> int:
    return sum(p.numel() for p in engine.adapted.trained.parameters() if p.requires_grad)


def _padded(engine: Any) -> list[int]:
    """Elements of this process' part of every parameter group."""
    return [sum(p.numel() for p in group["params"]) for group in engine.engine.basic_optimizer.param_groups]
