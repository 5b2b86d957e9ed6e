"""Counts what a step sends: every collective of torch.distributed, with the bytes that this process puts in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from salient_eval.bench.traffic import Log, counted

from tests.dist import scenario
from tests.dist.heterolora_worker import DATA
from tests.dist.scenario import Case


def steps(global_rank: int, world_size: int, model: Path, cases: dict[str, Case]) -> dict[str, Any]:
    """By case: trainable elements at the end, padded elements of the optimizer's groups, the traffic of every step, and
    what the method's options say of it."""
    found = {}
    for name, case in cases.items():
        with counted() as log:  # while the engine is built too, which keeps references to collectives
            found[name] = one(global_rank, world_size, model, case, log)
    return found


def one(global_rank: int, world_size: int, model: Path, case: Case, log: Log) -> dict[str, Any]:
    engine = scenario.build(case, model, world_size, probe_data=DATA)
    rows, before, method = [], _elements(engine), case.config(model).method
    said = {
        "event": method.event_traffic(engine.adapted.layout, before),
        "step": method.step_traffic(engine.adapted.layout, scenario.GLOBAL_BATCH // world_size),
    }
    while engine.step < (case.steps if case.speed.get("compaction") == "last" else 9):
        log.clear()
        report = engine.train_step(*scenario.batches(engine.step, global_rank, world_size))
        rows.append((report.event is not None, sorted(log)))
    found = {"elements": _elements(engine), "before": before, "rows": rows, "groups": _padded(engine), "said": said}
    engine.engine.destroy()
    return found


def _elements(engine: Any) -> int:
    return sum(p.numel() for p in engine.adapted.trained.parameters() if p.requires_grad)


def _padded(engine: Any) -> list[int]:
    """Elements of this process' part of every parameter group."""
    return [sum(p.numel() for p in group["params"]) for group in engine.engine.basic_optimizer.param_groups]
