"""The same training in plain torch: one process, no DeepSpeed, the penalty as an ordinary term of the loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.adapters.inject import AdaptedModel, inject
from salient_ds.methods.table import build_method
from salient_ds.models.loading import load_model
from salient_ds.ranks import Part, RankDecision
from tests.dist.scenario import GLOBAL_BATCH, TOTAL_STEPS, Case, example


class WholeView:
    """All factors of all adapters, unsharded."""

    key = "whole"

    def __init__(self, adapted: AdaptedModel) -> None:
        self._adapted = adapted
        self._parameters: dict[Part, torch.nn.Parameter] = {}
        for module, adapter in enumerate(adapted.adapters.values()):
            for factor, address in adapter.factors().items():
                numel = address.parameter.numel()
                part = Part(factor, module, 0, numel, address.shape, address.rank_axis)
                self._parameters[part] = address.parameter
        self.parts = tuple(self._parameters)

    def value(self, part: Part) -> Tensor:
        return self._parameters[part].detach().view(-1)

    def grad(self, part: Part) -> Tensor:
        grad = self._parameters[part].grad
        assert grad is not None
        return grad.view(-1)

    def sigma(self) -> tuple[Tensor, Tensor]:
        values = [self.value(part) for part in self.parts if part.factor == "E"]
        return torch.arange(self._adapted.layout.total), torch.cat(values)


def penalty_of(adapted: AdaptedModel, mask_N: Tensor, coefficient: float, form: str) -> tuple[Tensor, Tensor]:
    """Value (differentiable) and norms (M, 2), written as the papers write it."""
    masks = mask_N.split(list(adapted.layout.ranks))
    norms = []
    for adapter, mask in zip(adapted.adapters.values(), masks, strict=True):
        factors = {k: a.parameter for k, a in adapter.factors().items()}
        identity = torch.diag(mask.float())
        norms.append(torch.stack([
            (factors["A"] @ factors["A"].t() - identity).norm(), (factors["B"].t() @ factors["B"] - identity).norm(),
        ]))  # fmt: skip
    stacked = torch.stack(norms)
    value = coefficient * (stacked.square().sum() if form == "squared" else stacked.mean())
    return value, stacked.detach()


def train(case: Case, model_dir: Path) -> dict[str, Any]:
    """Losses, decisions and final factors of the run that every sharded one has to equal."""
    config = case.config(model_dir)
    model = load_model(config.model, config.train, {})
    adapted = inject(model, config.adapter, config.method, 0, torch.float32)
    method = build_method(config.method, adapted.layout, TOTAL_STEPS)
    view = WholeView(adapted)
    method.attach(adapted.layout, [view])
    events = {event.step: event for event in method.events}
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.train.lr, weight_decay=0.0)
    current = RankDecision(0, adapted.layout.total, torch.ones(adapted.layout.total, dtype=torch.bool))
    losses, decisions = [], []
    for step in range(1, TOTAL_STEPS + 1):
        rows = [example(step - 1, row) for row in range(GLOBAL_BATCH)]
        counts = [int((labels[:, 1:] != -100).sum()) for _, labels in rows]
        task = sum(
            model(input_ids=tokens, labels=labels).loss * count
            for (tokens, labels), count in zip(rows, counts, strict=True)
        ) / sum(counts)
        orthogonality = config.adapter.orthogonality
        penalty, norms = penalty_of(adapted, current.mask_N, orthogonality.coefficient, orthogonality.form)
        optimizer.zero_grad()
        (task + penalty).backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.train.max_grad_norm)
        optimizer.step()
        drop(adapted, optimizer, current)
        method.observe(view, step)
        method.end_step(step, norms)
        losses.append(float(task.detach()))
        if step in events:
            current = method.allocate(method.contribution(), events[step], current)
            decisions.append(current)
            adapted.set_mask(current.mask_N, method.policy.gate_forward)
            drop(adapted, optimizer, current)
    return {"losses": losses, "decisions": decisions, "adapted": adapted}


@torch.no_grad()
def drop(adapted: AdaptedModel, optimizer: torch.optim.Optimizer, decision: RankDecision) -> None:
    """Zero pruned rows of every factor and its moments."""
    masks = decision.mask_N.split(list(adapted.layout.ranks))
    for adapter, mask in zip(adapted.adapters.values(), masks, strict=True):
        for address in adapter.factors().values():
            state = optimizer.state.get(address.parameter, {})
            tensors = [address.parameter.data] + [state[k] for k in ("exp_avg", "exp_avg_sq") if k in state]
            for tensor in tensors:
                tensor.transpose(0, address.rank_axis)[~mask] = 0
