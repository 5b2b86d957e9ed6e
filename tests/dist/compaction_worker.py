"""Training runs that drop pruned rows, and what they look like afterwards. Runs inside a process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from salient_ds.engine.checkpoint import kept_rows, load, save
from salient_ds.engine.engine import AllocatingEngine
from tests.dist.scenario import TOTAL_STEPS, Case, advance, build, local_state

BEFORE, AFTER = 12, 15
"""Steps of the two checkpoints: the last event comes between them."""
IDENTITY = {"case": "compaction"}


def elements(engine: AllocatingEngine) -> int:
    """fp32 elements that the optimizer of this process holds."""
    return sum(buffer.numel() for buffer in engine.shards.layout.buffers)


def run(global_rank: int, world_size: int, model: Path, cases: list[Case]) -> list[dict[str, Any]]:
    """Every case from scratch to the end."""
    results = []
    for case in cases:
        engine = build(case, model, world_size)
        at_start = elements(engine)
        losses, decisions = advance(engine, TOTAL_STEPS, global_rank, world_size)
        results.append({
            "losses": losses, "masks": [d.mask_N.clone() for d in decisions], "state": local_state(engine),
            "elements": (at_start, elements(engine)), "kept": engine.kept_N.clone(),
            "live": engine.decisions.held.mask_N.clone(),
            "layout": engine.initial_layout, "ranks": engine.adapted.layout.ranks,
            "hooks": len(engine.engine.module._forward_pre_hooks),
        })  # fmt: skip
        engine.engine.destroy()
    return results


def save_twice(global_rank: int, world_size: int, model: Path, case: Case, folder: Path) -> list[float]:
    """Losses of a whole run that saves before and after its compaction."""
    engine = build(case, model, world_size)
    losses = []
    for until in (BEFORE, AFTER, TOTAL_STEPS):
        losses += advance(engine, until, global_rank, world_size)[0]
        if until < TOTAL_STEPS:
            save(engine.state, folder, IDENTITY, {}, keep=9)
    engine.engine.destroy()
    return losses


def resume(
    global_rank: int, world_size: int, model: Path, cases: list[Case], folder: Path
) -> list[dict[int, tuple[list[float], int]]]:
    """Losses from each checkpoint on, and the ranks that are left, for every case."""
    out = []
    for case in cases:
        found = {}
        for step in (BEFORE, AFTER):
            losses, _, left = go_on(global_rank, world_size, model, case, folder, step, IDENTITY)
            found[step] = losses, left
        out.append(found)
    return out


def go_on(
    global_rank: int, world_size: int, model: Path, case: Case, folder: Path, step: int, identity: dict[str, str]
) -> tuple[list[float], int, int]:
    """Losses from the checkpoint of ``step`` on, rows that there are right after loading, and those at the end."""
    path = folder / f"step-{step:08d}"
    engine = build(case, model, world_size, kept_rows(path))
    load(engine.state, path, identity)
    assert engine.step == step
    rows = engine.adapted.layout.total
    losses = advance(engine, TOTAL_STEPS, global_rank, world_size)[0]
    engine.engine.destroy()
    return losses, rows, engine.adapted.layout.total


def refuse(global_rank: int, world_size: int, model: Path, case: Case, folder: Path, step: int) -> str:
    """Why a run whose adapters are not packed does not continue a checkpoint that lacks rows."""
    try:
        build(case, model, world_size, kept_rows(folder / f"step-{step:08d}"))
    except ValueError as error:
        return str(error)
    return ""
