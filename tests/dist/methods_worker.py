"""Every method on one stage: fresh, whole, stopped and resumed, and started twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.engine import checkpoint
from salient_ds.export.fold import delta_weight, fold
from salient_ds.models.loading import load_model
from salient_ds.run.export import read_factors
from tests.dist import scenario
from tests.dist.resume_worker import IDENTITY, STOP, outcome, resume
from tests.dist.scenario import TOTAL_STEPS, Case, example


def run(global_rank: int, world_size: int, model: Path, cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    """All cells of the matrix, one after the other in the same processes."""
    tokens, _ = example(99, 1)
    with torch.no_grad():
        config = Case(0).config(model)
        expected = load_model(config.model, config.train, {})(input_ids=tokens).logits
    cells = [(case, folder / str(i), tokens, expected) for i, case in enumerate(cases)]
    return [cell(global_rank, world_size, model, *arguments) for arguments in cells]


def cell(
    global_rank: int, world_size: int, model: Path, case: Case, folder: Path, tokens: Tensor, base_logits: Tensor
) -> dict[str, Any]:
    engine = scenario.build(case, model, world_size)
    engine.engine.eval()
    with torch.no_grad():
        fresh = torch.equal(engine.engine(input_ids=tokens).logits, base_logits)
    head = scenario.advance(engine, STOP, global_rank, world_size)
    path = checkpoint.save(engine.state, folder, IDENTITY, {"note": 0}, keep=2)
    tail = scenario.advance(engine, TOTAL_STEPS, global_rank, world_size)
    engine.finish()
    whole = outcome(engine, head[0] + tail[0], head[1] + tail[1])
    decisions = head[1] + tail[1]
    end = checkpoint.save(engine.state, folder / "end", IDENTITY, {}, keep=2)
    engine.engine.destroy()
    again = resume(case, model, folder, global_rank, world_size)
    again["losses"] = head[0] + again["losses"]
    again["digests"] = [d.digest() for d in head[1]] + again["digests"]
    return {"fresh": fresh, "whole": whole, "again": again, "decisions": decisions, "exported": exported(end),
            "exported_ranks": [factors.rank for factors in read_factors(path)],
            "repeat": repeat(case, model, path, head[0], global_rank, world_size)}  # fmt: skip


def exported(saved: Path) -> list[tuple[int, Tensor]]:
    """Rank and dense update of every plain pair that an export of the checkpoint would write."""
    pairs = [fold(factors) for factors in read_factors(saved)]
    return [(pair.rank, delta_weight(pair)) for pair in pairs if pair is not None]


def repeat(case: Case, model: Path, saved: Path, losses: list[float], global_rank: int, world_size: int) -> list[str]:
    """Run up to the checkpoint once more; what differs by a single bit (nothing should)."""
    engine = scenario.build(case, model, world_size)
    different = [] if scenario.advance(engine, STOP, global_rank, world_size)[0] == losses else ["losses"]
    reader = checkpoint.ShardReader(saved)
    for f in engine.shards.layout.fragments:
        stored = reader.read("master", f.name, f.lo, f.numel)
        if not torch.equal(stored, engine.shards.master(f)):
            different.append(f"master of {f.name}")
    for name, part, value in engine.method.local_state():
        if not torch.equal(reader.read_part(name, part), value):
            different.append(f"{name} of {part}")
    engine.engine.destroy()
    return different


def statistics_norm(global_rank: int, world_size: int, model: Path, cases: list[Case]) -> list[dict[str, float]]:
    """Sum of every saved statistic of this process after two steps."""
    found = []
    for case in cases:
        engine = scenario.build(case, model, world_size)
        scenario.advance(engine, 2, global_rank, world_size)
        sums: dict[str, float] = {}
        for name, _, value in engine.method.local_state():
            sums[name] = sums.get(name, 0.0) + float(value.double().sum())
        found.append(sums)
        engine.engine.destroy()
    return found
