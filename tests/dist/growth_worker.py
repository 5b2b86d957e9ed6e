"""IncreLoRA's rows made when they are needed, and all from the start. Runs inside a process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from salient_ds.engine.checkpoint import save
from tests.dist.compaction_worker import elements, go_on
from tests.dist.scenario import TOTAL_STEPS, Case, batches, build, local_state

BEFORE, AFTER = 4, 10
"""Steps of the two checkpoints: room is made for the first time between them, and growth ends later."""
IDENTITY = {"case": "growth"}


def run(
    global_rank: int, world_size: int, model: Path, cases: list[Case], folders: list[Path | None]
) -> list[dict[str, Any]]:
    """Every case from scratch to the end; checkpoints where there is a folder."""
    results = []
    for case, folder in zip(cases, folders, strict=True):
        engine = build(case, model, world_size)
        found: dict[str, Any] = {"losses": [], "masks": [], "made": [], "elements": [elements(engine)]}
        while engine.step < TOTAL_STEPS:
            report = engine.train_step(*batches(engine.step, global_rank, world_size))
            found["losses"].append(report.loss)
            found["elements"].append(elements(engine))
            if report.event is not None:
                found["masks"].append(report.event.kept_N)
                found["made"].append(report.event.growth is not None)
            if folder is not None and engine.step in (BEFORE, AFTER):
                save(engine.state, folder, IDENTITY, {}, keep=9)
        found |= {
            "state": local_state(engine), "layout": engine.initial_layout, "ranks": engine.adapted.layout.ranks,
            "hooks": len(engine.engine.module._forward_pre_hooks),
        }  # fmt: skip
        results.append(found)
        engine.engine.destroy()
    return results


def resume(global_rank: int, world_size: int, model: Path, jobs: list[tuple[Case, Path, int]]) -> list[dict[str, Any]]:
    """Losses from each checkpoint on, rows that there were right after loading, and those left at the end."""
    found = [go_on(global_rank, world_size, model, *job, IDENTITY) for job in jobs]
    return [{"losses": losses, "rows": rows, "left": left} for losses, rows, left in found]
