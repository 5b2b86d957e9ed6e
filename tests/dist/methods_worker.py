"""Every method on one stage: fresh, whole, stopped and resumed, and started twice; and the same in plain torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.adapters.inject import AdaptedModel, inject
from salient_ds.engine import checkpoint
from salient_ds.export.fold import delta_weight, fold
from salient_ds.methods.table import build_method
from salient_ds.models.loading import load_model
from salient_ds.ranks import RankDecision
from salient_ds.run.export import read_factors
from tests.dist import scenario
from tests.dist.reference import WholeView
from tests.dist.resume_worker import IDENTITY, STOP, outcome, resume
from tests.dist.scenario import GLOBAL_BATCH, TOTAL_STEPS, Case, example


def run(rank: int, world: int, model: Path, cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    """All cells of the matrix, one after the other in the same processes."""
    tokens, _ = example(99, 1)
    with torch.no_grad():
        config = Case(0).config(model)
        expected = load_model(config.model, config.train, {})(input_ids=tokens).logits
    return [cell(rank, world, model, case, folder / str(i), tokens, expected) for i, case in enumerate(cases)]


def cell(
    rank: int, world: int, model: Path, case: Case, folder: Path, tokens: Tensor, base_logits: Tensor
) -> dict[str, Any]:
    engine = scenario.build(case, model, world)
    engine.engine.eval()
    with torch.no_grad():
        fresh = torch.equal(engine.engine(input_ids=tokens).logits, base_logits)
    head = scenario.advance(engine, STOP, rank, world)
    path = checkpoint.save(engine, folder, IDENTITY, {"note": 0}, keep=2)
    tail = scenario.advance(engine, TOTAL_STEPS, rank, world)
    engine.finish()
    whole = outcome(engine, head[0] + tail[0], head[1] + tail[1])
    decisions = head[1] + tail[1]
    end = checkpoint.save(engine, folder / "end", IDENTITY, {}, keep=2)
    engine.engine.destroy()
    again = resume(case, model, folder, rank, world)
    again["losses"] = head[0] + again["losses"]
    again["digests"] = [d.digest() for d in head[1]] + again["digests"]
    return {"fresh": fresh, "whole": whole, "again": again, "decisions": decisions, "exported": exported(end),
            "exported_ranks": [factors.rank for factors in read_factors(path)],
            "repeat": repeat(case, model, path, head[0], rank, world)}  # fmt: skip


def exported(saved: Path) -> list[tuple[int, Tensor]]:
    """Rank and dense update of every plain pair that an export of the checkpoint would write."""
    pairs = [fold(factors) for factors in read_factors(saved)]
    return [(pair.rank, delta_weight(pair)) for pair in pairs if pair is not None]


def repeat(case: Case, model: Path, saved: Path, losses: list[float], rank: int, world: int) -> list[str]:
    """Run up to the checkpoint once more; what differs by a single bit (nothing should)."""
    engine = scenario.build(case, model, world)
    different = [] if scenario.advance(engine, STOP, rank, world)[0] == losses else ["losses"]
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


def statistics_norm(rank: int, world: int, model: Path, cases: list[Case]) -> list[dict[str, float]]:
    """Sum of every saved statistic of this process after two steps."""
    found = []
    for case in cases:
        engine = scenario.build(case, model, world)
        scenario.advance(engine, 2, rank, world)
        sums: dict[str, float] = {}
        for name, _, value in engine.method.local_state():
            sums[name] = sums.get(name, 0.0) + float(value.double().sum())
        found.append(sums)
        engine.engine.destroy()
    return found


def plain(case: Case, model_dir: Path) -> dict[str, Any]:
    """The same training without DeepSpeed: losses and decisions that every cell of the matrix has to reproduce."""
    config = replace(case, stage=0).config(model_dir)
    model = load_model(config.model, config.train, {})
    adapted = inject(model, config.adapter, config.method, 0, torch.float32)
    method = build_method(config.method, adapted.layout, TOTAL_STEPS)
    view = WholeView(adapted)
    method.attach(adapted.layout, [view])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.train.lr, weight_decay=0.0)
    current = RankDecision(0, adapted.layout.total, torch.ones(adapted.layout.total, dtype=torch.bool))
    losses, decisions = [], []
    for step in range(1, TOTAL_STEPS + 1):
        losses.append(backward(adapted, step))
        torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
        if method.needs_before:
            method.before(view, step)
        optimizer.step()
        if current.hold:
            zero_sigma(adapted, current)
        method.observe(view, step)
        method.end_step(step, None)
        optimizer.zero_grad()
        for event in method.events:
            if event.step == step:
                current = method.allocate(method.contribution(), event, current)
                decisions.append(current)
                zero_sigma(adapted, current)
    return {"losses": losses, "decisions": decisions, "adapted": adapted}


def backward(adapted: AdaptedModel, step: int) -> float:
    """Gradients of the global batch, the penalty's once; its mean loss per target."""
    rows = [example(step - 1, row) for row in range(GLOBAL_BATCH)]
    counts = [int((labels[:, 1:] != -100).sum()) for _, labels in rows]
    adapted.model.train()
    total = 0.0
    for (tokens, labels), count in zip(rows, counts, strict=True):
        if adapted.penalty is not None and labels is rows[-1][1]:
            adapted.penalty.arm(1.0, torch.device("cpu"))
        loss = adapted.model(input_ids=tokens, labels=labels).loss * count / sum(counts)
        loss.backward()
        total += float(loss.detach())
    if adapted.penalty is not None:
        adapted.penalty.disarm()
    return total


@torch.no_grad()
def zero_sigma(adapted: AdaptedModel, decision: RankDecision) -> None:
    masks = decision.mask_N.split(list(adapted.layout.ranks))
    for adapter, mask in zip(adapted.adapters.values(), masks, strict=True):
        if "E" in adapter.factors():
            adapter.factors()["E"].parameter[~mask] = 0
