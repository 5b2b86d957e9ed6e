"""The same training in plain torch: one process, no DeepSpeed, the penalty as an ordinary term of the loss.

Forward, backward, loss, penalty and optimizer are written here. What a decision does, and when, is left to
:class:`PlainTraining`, which obeys the method's MaskPolicy: one loop serves all methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from salient_eval.bench.plain_training import PlainTraining
from torch import Tensor

from salient_ds.adapters.growing import GrowingLinear
from salient_ds.adapters.inject import AdaptedModel
from salient_ds.adapters.options import OrthogonalityConfig
from salient_ds.config.run import TrainConfig
from salient_ds.engine.build import rate_plan
from salient_ds.heterolora.probing import ProbeScores, ProbingMethod
from salient_ds.methods.duties import Method
from salient_ds.models.loading import load_model
from salient_ds.run.adapt import adapt
from tests.dist.dense_scores import DenseScores
from tests.dist.scenario import GLOBAL_BATCH, Case, example


def train_plain(case: Case, model_dir: Path) -> dict[str, Any]:
    """The run that every sharded one has to equal.

    Returns:
        losses by step, decisions, adapted (the trained model), scores (of whole matrices, where the method asks for
        them, by scored step), steps (that the optimizer took with each matrix).
    """
    config = case.config(model_dir)
    model: Any = load_model(config.model, config.train, {})
    adapted = adapt(model, config, torch.float32)
    dense = DenseScores(adapted)
    if adapted.scores is not None:
        adapted.scores = dense
    rates = rate_plan(config.train, case.steps)
    method = config.method.build(adapted.layout, case.steps, rates)
    optimizer = adamw(adapted, config.train, config.sigma_ratio(adapted.layout))
    if isinstance(method, ProbingMethod):
        leave_to_optimizer(method)
    training = PlainTraining(adapted, method, optimizer)
    losses = []
    model.train()
    for step in range(1, case.steps + 1):
        training.before_forward(step, lambda proxy: equal_scores(proxy, adapted))
        optimizer.zero_grad()
        task = task_loss(model, step)
        penalty, norms = penalty_of(training, config.adapter.orthogonality)
        (task + penalty).backward()
        if isinstance(method, ProbingMethod):
            drop_gradients(training)
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], config.train.max_grad_norm)
        training.before_optimizer(step)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rates.rate(step)
        optimizer.step()
        training.after_optimizer(step, norms)
        losses.append(float(task.detach()))
    training.finish()
    return {"losses": losses, "decisions": training.taken, "adapted": adapted, "scores": dense.history,
            "steps": own_steps(adapted, optimizer)}  # fmt: skip


def adamw(adapted: AdaptedModel, train: TrainConfig, ratio: float) -> torch.optim.AdamW:
    """Weight decay for everything but singular values, which have a learning rate of their own."""
    factors = [(name, a.parameter) for x in adapted.adapters.values() for name, a in x.factors().items()]
    vectors, sigmas = ([p for name, p in factors if (name == "E") == wanted] for wanted in (False, True))
    groups: list[dict[str, Any]] = [
        {"params": vectors, "weight_decay": train.weight_decay, "peak": train.lr},
        {"params": sigmas, "weight_decay": 0.0, "peak": train.lr * ratio},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=train.lr, betas=train.betas, eps=train.eps
    )


def task_loss(model: Any, step: int) -> Tensor:
    """Mean over all targets of the global batch."""
    rows = [example(step - 1, row) for row in range(GLOBAL_BATCH)]
    counts = [int((labels[:, 1:] != -100).sum()) for _, labels in rows]
    losses = [model(input_ids=tokens, labels=labels).loss for tokens, labels in rows]
    return torch.stack([loss * count for loss, count in zip(losses, counts, strict=True)]).sum() / sum(counts)


def penalty_of(training: PlainTraining, options: OrthogonalityConfig) -> tuple[Tensor, Tensor | None]:
    """Value (differentiable) and norms by matrix and term, as the papers write them; (0, None) for plain adapters."""
    norms = []
    for adapter, mask_R in zip(training.adapted.adapters.values(), penalised_rows(training), strict=True):
        factors = {name: address.parameter for name, address in adapter.factors().items()}
        if "aa" in factors:
            assert bool(mask_R.all())
            norms.append(two_scale_terms(**factors))
        elif "E" in factors:
            norms.append(svd_terms(factors["A"], factors["B"], mask_R.float()))
    if not norms:
        return torch.zeros(()), None
    stacked = torch.stack(norms)
    value = options.coefficient * (stacked.square().sum() if options.form == "squared" else stacked.mean())
    return value, stacked.detach()


def penalised_rows(training: PlainTraining) -> list[Tensor]:
    """By matrix the rows that take part in the forward pass: all, unless the method gates it."""
    held = training.decisions.held
    mask_N = held.mask_N if training.method.policy.gate_forward else torch.ones_like(held.mask_N)
    masks = [mask_R.clone() for mask_R in mask_N.split(list(training.adapted.layout.ranks))]
    for adapter, mask_R in zip(training.adapted.adapters.values(), masks, strict=True):
        if isinstance(adapter, GrowingLinear) and not held.hold:  # the next rows train ahead of time
            mask_R[: int(mask_R.sum()) + adapter.reserve] = True
    return masks


def svd_terms(A_RI: Tensor, B_OR: Tensor, mask_R: Tensor) -> Tensor:
    """||A A^T - I||_F and ||B^T B - I||_F over the rows of the mask, (2,)."""
    A_RI, B_OR, identity = A_RI * mask_R.unsqueeze(1), B_OR * mask_R, torch.diag(mask_R)
    return torch.stack([(A_RI @ A_RI.t() - identity).norm(), (B_OR.t() @ B_OR - identity).norm()])


def two_scale_terms(A: Tensor, B: Tensor, aa: Tensor, bb: Tensor, E: Tensor) -> Tensor:
    """How far the four factors of bb aa diag(E) B A are from orthogonal, and its two planes from each other, (5,)."""

    def distance(factor: Tensor) -> Tensor:
        narrow = factor if len(factor) <= factor.shape[1] else factor.t()
        return (narrow @ narrow.t() - torch.eye(len(narrow))).norm()

    return torch.stack([*(distance(factor) for factor in (A, B, aa, bb)), (bb @ aa @ B @ A).norm()])


def leave_to_optimizer(method: Method) -> None:
    """What stands still while a module is off is the optimizer's business here: it does not see the module."""
    method.needs_before = False


def drop_gradients(training: PlainTraining) -> None:
    """Modules that are off have gradients of exactly zero; without any, torch's AdamW leaves them out altogether."""
    masks = training.decisions.held.mask_N.split(list(training.adapted.layout.ranks))
    for adapter, mask_R in zip(training.adapted.adapters.values(), masks, strict=True):
        assert bool(mask_R.all()) or not bool(mask_R.any())
        for address in adapter.factors().values() if not bool(mask_R.any()) else ():
            assert address.parameter.grad is not None and not address.parameter.grad.any()
            address.parameter.grad = None


def equal_scores(proxy: str, adapted: AdaptedModel) -> ProbeScores:
    """Probes whose scores say nothing, so that modules are drawn."""
    assert proxy == "constant"
    return ProbeScores(torch.ones(len(adapted.adapters), dtype=torch.float64), None)


def own_steps(adapted: AdaptedModel, optimizer: torch.optim.Optimizer) -> list[int]:
    """How often AdamW has stepped the first factor of every matrix."""
    first = [next(iter(adapter.factors().values())).parameter for adapter in adapted.adapters.values()]
    return [int(optimizer.state[p]["step"]) if optimizer.state.get(p) else 0 for p in first]
