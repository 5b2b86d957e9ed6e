"""What an engine takes over from another: masters and moments, step counts, hyperparameters, schedule, loss scale."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from salient_ds.engine.shards import ShardMap
from salient_ds.zero.layouts import sync_copies

Read = Callable[[str, str, int, int], Tensor]
"""``read(kind, name, lo, numel)``: elements [lo, lo + numel) of "master" or a moment of a trainable tensor."""

COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def describe(inner: Any) -> dict[str, Any]:
    """State of a DeepSpeed engine that is equal on all processes."""
    return {
        "optimizer_steps": _optimizer_steps(inner.basic_optimizer),
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in inner.basic_optimizer.param_groups],
        "scheduler": inner.lr_scheduler.state_dict() if inner.lr_scheduler is not None else None,
        "counters": {key: getattr(inner, key) for key in COUNTERS},
        "loss_scaler": _loss_scaler(inner),
    }


def restore(inner: Any, shards: ShardMap, state: dict[str, Any], read: Read) -> None:
    """Bring a fresh engine to ``state`` (from :func:`describe`) and fill masters, moments and copies of its shards."""
    fragments = shards.layout.fragments
    for fragment in fragments:
        shards.master(fragment).copy_(read("master", fragment.name, fragment.lo, fragment.numel))
    _adopt(inner, shards.layout.buffers, state)
    for fragment in fragments if state["optimizer_steps"] is not None else []:
        for moment, target in shards.moments(fragment).items():
            target.copy_(read(moment, fragment.name, fragment.lo, fragment.numel))
    sync_copies(inner)


def _adopt(inner: Any, buffers: list[Tensor], state: dict[str, Any]) -> None:
    """All but tensors; moments of ``buffers`` are there afterwards, and zero."""
    if state["optimizer_steps"] is not None:
        for buffer in buffers:
            inner.basic_optimizer.state[buffer] = _fresh_state(inner.basic_optimizer, buffer, state["optimizer_steps"])
    for group, saved in zip(inner.basic_optimizer.param_groups, state["groups"], strict=True):
        group.update(saved)  # the scheduled learning rate too: a scheduler's own load does not set it
    if inner.lr_scheduler is not None and state["scheduler"] is not None:
        inner.lr_scheduler.load_state_dict(state["scheduler"])
    for name, value in state["counters"].items():
        setattr(inner, name, value)
    # Accumulation may differ here: the next micro-batch is the first of a step again.
    inner.micro_steps = inner.global_steps * inner.gradient_accumulation_steps()
    scaler = _scaler_of(inner)
    for name, value in state["loss_scaler"].items():
        if hasattr(scaler, name):  # another stage may keep its scale elsewhere, or none (bf16, fp32)
            setattr(scaler, name, value)


def _optimizer_steps(optimizer: torch.optim.Optimizer) -> int | None:
    """How often the basic optimizer stepped (the same for every buffer), None before the first step."""
    for state in optimizer.state.values():
        if "step" in state:
            return int(state["step"])
    return None


def _scaler_of(inner: Any) -> Any:
    return getattr(inner.optimizer, "loss_scaler", None) or getattr(inner.optimizer, "loss_scale_config", None)


def _loss_scaler(inner: Any) -> dict[str, Any]:
    scaler = _scaler_of(inner)
    plain = (int, float, bool, str, type(None))
    return {k: v for k, v in vars(scaler).items() if isinstance(v, plain)} if scaler is not None else {}


def _fresh_state(optimizer: torch.optim.Optimizer, buffer: Tensor, steps: int) -> dict[str, Any]:
    """Adam state of ``buffer`` after ``steps`` steps with zero moments; ``step`` in the optimizer's own type."""
    step: Any = steps  # DeepSpeed's FusedAdam and CPUAdam count with a Python int
    if type(optimizer).__module__.startswith("torch."):
        fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        step = torch.tensor(float(steps), dtype=torch.float32, device=buffer.device if fused else "cpu")
    zeros = {key: torch.zeros_like(buffer.data) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": step, **zeros}
