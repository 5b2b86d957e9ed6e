"""IncreLoRA through the engine, and the same in plain torch with dense gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.adapters.growing import GrowingLinear
from salient_ds.adapters.inject import AdaptedModel, inject
from salient_ds.engine import checkpoint
from salient_ds.engine.build import rate_plan
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.engine.reports import MicroBatch
from salient_ds.methods.base import ScoringMethod
from salient_ds.methods.table import build_method
from salient_ds.models.loading import load_model
from salient_ds.ranks import RankDecision, initial_decision
from tests.dist import scenario
from tests.dist.reference import WholeView
from tests.dist.resume_worker import IDENTITY, STOP, outcome, resume
from tests.dist.scenario import GLOBAL_BATCH, TOTAL_STEPS, Case, example

TOKENS = example(99, 1)[0]


def run(rank: int, world: int, model: Path, cases: list[Case], folder: Path) -> list[dict[str, Any]]:
    """Every case in turn: whole, and stopped and resumed; its last checkpoint and logits for the export."""
    return [cell(rank, world, model, case, folder / str(i)) for i, case in enumerate(cases)]


def cell(rank: int, world: int, model: Path, case: Case, folder: Path) -> dict[str, Any]:
    engine = scenario.build(case, model, world)
    fresh = logits(engine)
    scales = recorded_scores(engine)
    head = scenario.advance(engine, STOP, rank, world)
    middle = checkpoint.save(engine, folder / "middle", IDENTITY, {"note": 0}, keep=2)
    tail = scenario.advance(engine, TOTAL_STEPS, rank, world)
    engine.finish()
    whole = outcome(engine, head[0] + tail[0], head[1] + tail[1])
    end = checkpoint.save(engine, folder / "end", IDENTITY, {"note": 0}, keep=2)
    found = {"fresh": fresh, "whole": whole, "decisions": head[1] + tail[1], "end": end, "middle": middle,
             "logits": logits(engine), "scores": scales,
             "scaling": [a.scaling for a in engine.adapted.adapters.values()]}  # fmt: skip
    engine.engine.destroy()
    again = resume(case, model, folder / "middle", rank, world)
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


def exact_scores(rank: int, world: int, model: Path, cases: list[Case]) -> list[list[Tensor]]:
    """One row of data on every process, two steps: scores of the averaged gradient."""
    results = []
    for case in cases:
        engine = scenario.build(case, model, world)
        found = recorded_scores(engine)
        for step in range(2):
            engine.train_step(*one_row_each(step, rank, world))
        results.append(found)
        engine.engine.destroy()
    return results


def one_row_each(step: int, rank: int, world: int) -> tuple[list[MicroBatch], int]:
    rows = [example(step, row) for row in range(world)]
    counts = [int((labels[:, 1:] != -100).sum()) for _, labels in rows]
    tokens, labels = rows[rank]
    return [MicroBatch({"input_ids": tokens, "labels": labels}, counts[rank], (rank,))], sum(counts)


def refused(rank: int, world: int, model: Path, case: Case) -> str:
    """What building an engine with an impossible reduction says."""
    try:
        scenario.build(case, model, world)
    except ValueError as error:
        return str(error)
    return ""


class DenseScores:
    """sum |dW o dL/ddW| / sqrt(O I) the way a textbook would: inputs and output gradients kept, G in full."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self.adapters = list(adapted.adapters.values())
        self.gradient: list[Tensor] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Leaves the dense gradients of the backward passes inside, summed."""
        self.gradient = [torch.zeros(a.out_features, a.in_features) for a in self.adapters]
        handles = []
        for k, adapter in enumerate(self.adapters):
            handles.append(adapter.register_forward_hook(self._forward_hook(k)))
        yield
        for handle in handles:
            handle.remove()

    def _forward_hook(self, k: int) -> Any:
        def forward(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)

            def backward(grad: Tensor) -> None:
                self.gradient[k] += grad.flatten(0, -2).t() @ x

            output.register_hook(backward)

        return forward

    def score_M(self) -> Tensor:
        found = []
        for adapter, gradient in zip(self.adapters, self.gradient, strict=True):
            assert isinstance(adapter, GrowingLinear)
            with torch.no_grad():
                delta = (adapter.lora_B * adapter.sigma() * adapter.scaling) @ adapter.lora_A
                found.append((delta * gradient).abs().sum() / math.sqrt(delta.numel()))
        return torch.stack(found).double()


def plain(case: Case, model_dir: Path) -> dict[str, Any]:
    """The same training without DeepSpeed."""
    config = case.config(model_dir)
    model: Any = load_model(config.model, config.train, {})
    adapted = inject(model, config.adapter, config.method, 0, torch.float32)
    rates = rate_plan(config.train, TOTAL_STEPS)
    method = build_method(config.method, adapted.layout, TOTAL_STEPS, rates)
    assert isinstance(method, ScoringMethod)
    view, dense = WholeView(adapted), DenseScores(adapted)
    factors = [a.parameter for x in adapted.adapters.values() for f, a in x.factors().items() if f != "E"]
    sigmas = [x.factors()["E"].parameter for x in adapted.adapters.values()]
    optimizer = torch.optim.AdamW(
        [{"params": factors, "weight_decay": config.train.weight_decay}, {"params": sigmas, "weight_decay": 0.0}],
        lr=config.train.lr,
    )
    decision = initial_decision(method.policy, adapted.layout)
    events = {event.step: event for event in method.events}
    losses, decisions, scores = [], [], []
    model.train()
    for step in range(1, TOTAL_STEPS + 1):
        optimizer.zero_grad()
        loss, score_M = backward(model, adapted, dense, step)
        torch.nn.utils.clip_grad_norm_(factors + sigmas, config.train.max_grad_norm)
        method.before(view, step)
        for group in optimizer.param_groups:
            group["lr"] = config.train.lr * rates.rate(step)
        optimizer.step()
        method.observe(view, step)
        losses.append(loss)
        if method.scored_at(step):
            scores.append(score_M)
            method.take_scores(score_M, step)
        method.end_step(step, None)
        if step in events:
            previous, decision = decision, method.allocate({}, events[step], decision)
            decisions.append(decision)
            activate(adapted, previous, decision)
    return {"losses": losses, "decisions": decisions, "adapted": adapted, "scores": scores}


def backward(model: Any, adapted: AdaptedModel, dense: DenseScores, step: int) -> tuple[float, Tensor]:
    """Gradients of the global batch, its mean loss per target, and the sum of the scores of its rows."""
    rows = [example(step - 1, row) for row in range(GLOBAL_BATCH)]
    counts = [int((labels[:, 1:] != -100).sum()) for _, labels in rows]
    total, score_M = 0.0, torch.zeros(len(adapted.layout.ranks), dtype=torch.float64)
    assert adapted.penalty is not None
    for index, ((tokens, labels), count) in enumerate(zip(rows, counts, strict=True)):
        if index == len(rows) - 1:
            adapted.penalty.arm(1.0, torch.device("cpu"))
        with dense.recording():
            loss = model(input_ids=tokens, labels=labels).loss * count / sum(counts)
            loss.backward()
        total += float(loss.detach())
        score_M += dense.score_M()
    adapted.penalty.disarm()
    return total, score_M


@torch.no_grad()
def activate(adapted: AdaptedModel, previous: RankDecision, decision: RankDecision) -> None:
    adapted.set_mask(decision.mask_N, True, decision.hold)
    new_N = decision.mask_N & ~previous.mask_N
    for adapter, new_R in zip(adapted.adapters.values(), new_N.split(list(adapted.layout.ranks)), strict=True):
        adapter.factors()["E"].parameter[new_R] = 1e-5


def batch_scores(case: Case, model_dir: Path, world: int) -> Tensor:
    """Scores of the first step of :func:`exact_scores`: the gradient of the whole batch, then the absolute value."""
    config = case.config(model_dir)
    model: Any = load_model(config.model, config.train, {})
    adapted = inject(model, config.adapter, config.method, 0, torch.float32)
    dense = DenseScores(adapted)
    rows = [one_row_each(0, rank, world) for rank in range(world)]
    with dense.recording():
        for (batch,), targets in rows:
            (model(**batch.inputs).loss * batch.num_targets / targets).backward()
    return dense.score_M()


def fresh_factors(config: Any) -> list[Tensor]:
    """A (R, I) of every adapter as it is drawn."""
    adapted = inject(load_model(config.model, config.train, {}), config.adapter, config.method, 0, torch.float32)
    return [a.factors()["A"].parameter.detach() for a in adapted.adapters.values()]
