"""State of a DeepSpeed engine besides its masters: step counts, hyperparameters, schedule, loss scale, monitors."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

COUNTERS = ("global_steps", "global_samples", "skipped_steps")


def describe(inner: Any) -> dict[str, Any]:
    """The state of a DeepSpeed engine that is equal on all processes, without tensors; see :func:`adopt`."""
    return {
        "optimizer_steps": _optimizer_steps(inner.basic_optimizer),
        "groups": [{k: v for k, v in g.items() if k != "params"} for g in inner.basic_optimizer.param_groups],
        "scheduler": inner.lr_scheduler.state_dict() if inner.lr_scheduler is not None else None,
        "counters": {key: getattr(inner, key) for key in COUNTERS},
        "loss_scaler": _loss_scaler(inner),
    }


def adopt(inner: Any, buffers: list[Tensor], state: dict[str, Any], keep: Collection[str] = ()) -> None:
    """Bring a fresh DeepSpeed engine to a state from :func:`describe`.

    Tensors are not restored. If the state is from after the first step, Adam moments of ``buffers`` exist afterwards
    and are zero.

    Args:
        keep: entries of the optimizer's parameter groups that stay as they are in the fresh engine. With "lr" among
            them, the learning rate becomes that of the fresh engine's own schedule at the state's step.
    """
    if state["optimizer_steps"] is not None:
        for buffer in buffers:
            inner.basic_optimizer.state[buffer] = _fresh_state(inner.basic_optimizer, buffer, state["optimizer_steps"])
    groups = inner.basic_optimizer.param_groups
    for group, saved in zip(groups, state["groups"], strict=True):
        # the current learning rate too: a scheduler's load_state_dict does not set it
        group.update({key: value for key, value in saved.items() if key not in keep})
    schedule = inner.lr_scheduler
    if schedule is not None and state["scheduler"] is not None:
        base_lrs = schedule.base_lrs
        schedule.load_state_dict(dict(state["scheduler"]))
        if "lr" in keep:
            schedule.base_lrs = base_lrs
            rates = [base * factor(schedule.last_epoch)
                     for base, factor in zip(base_lrs, schedule.lr_lambdas, strict=True)]  # fmt: skip
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            schedule._last_lr = rates
    for name, value in state["counters"].items():
        setattr(inner, name, value)
    # The number of accumulation steps may differ from before: make the next micro-batch the first of a step.
    inner.micro_steps = inner.global_steps * inner.gradient_accumulation_steps()
    scaler = _scaler_of(inner)
    for name, value in state["loss_scaler"].items():
        if hasattr(scaler, name):  # another stage may keep the scale elsewhere, or have none (bf16, fp32)
            setattr(scaler, name, value)


def _optimizer_steps(optimizer: torch.optim.Optimizer) -> int | None:
    """Number of steps that the basic optimizer took (the same for every buffer); None before the first."""
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
    """Adam state of ``buffer`` after ``steps`` steps, with zero moments. ``step`` has the optimizer's own type."""
    step: Any = steps  # DeepSpeed's FusedAdam and CPUAdam count with a Python int
    if type(optimizer).__module__.startswith("torch."):
        fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
        step = torch.tensor(float(steps), dtype=torch.float32, device=buffer.device if fused else "cpu")
    zeros = {key: torch.zeros_like(buffer.data) for key in ("exp_avg", "exp_avg_sq")}
    return {"step": step, **zeros}


def sync_copies(engine: Any) -> None:
    """Update the training-precision copies from the fp32 masters. Collective: all processes call it."""
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        live = [p for p in optimizer.persistent_parameters if p.ds_status.name == "AVAILABLE"]
        if live:  # persistent parameters keep a full copy between steps: rebuild it from the new partitions
            live[0].partition(param_list=live)
            live[0].all_gather(param_list=live)
    elif kind in ("DeepSpeedZeroOptimizer", "BF16_Optimizer"):
        optimizer.update_lp_params()
    elif kind == "FP16_UnfusedOptimizer":
        for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
            for master, parameter in zip(masters, parameters, strict=True):
                parameter.data.copy_(master.data)
    elif kind == "FP16_Optimizer":
        for flat, parameters in zip(optimizer.fp32_groups_flat, optimizer.fp16_groups, strict=True):
            pieces = flat.data.split([p.numel() for p in parameters])
            for piece, parameter in zip(pieces, parameters, strict=True):
                parameter.data.copy_(piece.view_as(parameter))


def loss_scale(engine: Any) -> float:
    """The factor by which the loss is scaled before backward (1 unless fp16)."""
    scale = getattr(engine.optimizer, "loss_scale", None)
    return float(scale) if scale is not None else 1.0


def basic_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer under DeepSpeed's wrapper. It steps the fp32 buffers, and its hooks see them."""
    found: torch.optim.Optimizer = engine.basic_optimizer
    return found


def release_gathered(engine: Any) -> None:
    """Let ZeRO-3 release parameters that its last backward hook left gathered. Does nothing at other stages."""
    offload = getattr(engine.optimizer, "parameter_offload", None)
    if offload is not None:
        offload.release_backward_leftovers()


def write_monitors(engine: Any, values: dict[str, float]) -> None:
    """Write values to the monitors that the ZeRO JSON enables (TensorBoard, W&B, CSV), if any."""
    if engine.monitor.enabled:
        engine.monitor.write_events([(tag, value, engine.global_samples) for tag, value in values.items()])


def has_monitors(engine: Any) -> bool:
    """Whether the ZeRO JSON enables any monitor."""
    return bool(engine.monitor.enabled)


def leave_out_shared_memory_collective() -> None:
    """Keep DeepSpeed from compiling its shared-memory collective for CPU processes."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def retire(engine: Any) -> None:
    """Detach an engine of stage 0, 1 or 2 from its module, including the two hooks that its own ``destroy`` leaves."""
    engine.destroy()
    engine.module_forward_pre_hook.remove()
    engine.module_forward_post_hook.remove()
