"""IncreLoRA through the engine, and its scores from dense gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.adapters.inject import inject
from salient_ds.engine import checkpoint
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.engine.reports import MicroBatch
from salient_ds.models.loading import load_model
from tests.dist import scenario
from tests.dist.dense_scores import dense_score, watch_gradients
from tests.dist.resume_worker import IDENTITY, STOP, outcome, resume
from tests.dist.scenario import TOTAL_STEPS, Case, example

TOKENS = example(99, 1)[0]


def run(global_rank: int, world_size: int, model: Path, cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    """Every case in turn: whole, and stopped and resumed; its last checkpoint and logits for the export."""
    return [cell(global_rank, world_size, model, case, folder / str(i)) for i, case in enumerate(cases)]


def cell(global_rank: int, world_size: int, model: Path, case: Case, folder: Path) -> dict[str, Any]:
    engine = scenario.build(case, model, world_size)
    fresh = logits(engine)
    scales = recorded_scores(engine)
    head = scenario.advance(engine, STOP, global_rank, world_size)
    middle = checkpoint.save(engine.state, folder / "middle", IDENTITY, {"note": 0}, keep=2)
    tail = scenario.advance(engine, TOTAL_STEPS, global_rank, world_size)
    engine.finish()
    whole = outcome(engine, head[0] + tail[0], head[1] + tail[1])
    end = checkpoint.save(engine.state, folder / "end", IDENTITY, {"note": 0}, keep=2)
    found = {"fresh": fresh, "whole": whole, "decisions": head[1] + tail[1], "end": end, "middle": middle,
             "logits": logits(engine), "scores": scales,
             "scaling": [a.scaling for a in engine.adapted.adapters.values()]}  # fmt: skip
    engine.engine.destroy()
    again = resume(case, model, folder / "middle", global_rank, world_size)
    again["losses"] = head[0] + again["losses"]
    again["digests"] = [d.digest() for d in head[1]] + again["digests"]
    return found | {"again": again}


def logits(engine: AllocatingEngine) -> Tensor:
    engine.engine.eval()
    with torch.no_grad():
        out: Tensor = engine.engine(input_ids=TOKENS).logits.float()
    engine.engine.train()
    return out


def recorded_scores(engine: AllocatingEngine) -> list[Tensor]:
    """The scores that the method is given from now on."""
    found: list[Tensor] = []
    method: Any = engine.method
    take = method.take_scores
    method.take_scores = lambda score_M, step: (found.append(score_M.cpu().clone()), take(score_M, step))
    return found


def exact_scores(global_rank: int, world_size: int, model: Path, cases: list[Case]) -> list[list[Tensor]]:
    """One row of data on every process, two steps: scores of the averaged gradient."""
    results = []
    for case in cases:
        engine = scenario.build(case, model, world_size)
        found = recorded_scores(engine)
        for step in range(2):
            engine.train_step(*one_row_each(step, global_rank, world_size))
        results.append(found)
        engine.engine.destroy()
    return results


def one_row_each(step: int, global_rank: int, world_size: int) -> tuple[list[MicroBatch], int]:
    rows = [example(step, row) for row in range(world_size)]
    counts = [int((labels[:, 1:] != -100).sum()) for _, labels in rows]
    tokens, labels = rows[global_rank]
    return [MicroBatch({"input_ids": tokens, "labels": labels}, counts[global_rank], (global_rank,))], sum(counts)


def refused(global_rank: int, world_size: int, model: Path, case: Case) -> str:
    """What building an engine with an impossible reduction says."""
    try:
        scenario.build(case, model, world_size)
    except ValueError as error:
        return str(error)
    return ""


def batch_scores(case: Case, model_dir: Path, world_size: int) -> Tensor:
    """Scores of the first step of :func:`exact_scores`: the gradient of the whole batch, then the absolute value."""
    config = case.config(model_dir)
    model: Any = load_model(config.model, config.train, {})
    adapters = list(inject(model, config.adapter, config.method, 0, torch.float32).adapters.values())
    gradients = [torch.zeros(a.out_features, a.in_features) for a in adapters]
    watch_gradients(adapters, lambda k, gradient_OI: gradients[k].add_(gradient_OI))
    for global_rank in range(world_size):
        (batch,), targets = one_row_each(0, global_rank, world_size)
        (model(**batch.inputs).loss * batch.num_targets / targets).backward()
    return torch.stack([dense_score(*pair) for pair in zip(adapters, gradients, strict=True)])


def fresh_factors(config: Any) -> list[Tensor]:
    """A (R, I) of every adapter as it is drawn."""
    adapted = inject(load_model(config.model, config.train, {}), config.adapter, config.method, 0, torch.float32)
    return [a.factors()["A"].parameter.detach() for a in adapted.adapters.values()]
