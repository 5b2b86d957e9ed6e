"""Skips steps whose gradients are not finite, where DeepSpeed 0.19.8 would take them.

Its wrapped optimizers (ZeRO-1, 2, 3, fp16, bf16) look at the norm. In fp32 at stage 0 nothing is wrapped, so that one
infinite gradient makes every parameter NaN.
"""

from __future__ import annotations

from typing import Any

import torch

from salient_ds.zero.internals.clipping import norm_over_processes


def skips_by_itself(engine: Any) -> bool:
    """Whether DeepSpeed wraps the optimizer of the engine, and looks at the gradients itself."""
    return engine.optimizer is not engine.basic_optimizer


def skip_non_finite(engine: Any) -> None:
    """Make an engine without a wrapped optimizer skip steps whose gradient norm is not finite, as others do.

    The norm is recorded as well, which DeepSpeed does not do here. Gradients are averaged before the step, so that all
    processes see the same norm. Does nothing if DeepSpeed wraps the optimizer.
    """
    if skips_by_itself(engine):
        return
    optimizer, step = engine.optimizer, engine.optimizer.step

    def clip() -> None:
        from deepspeed.runtime.utils import clip_grad_norm_

        optimizer._global_grad_norm = clip_grad_norm_(
            parameters=engine.module.parameters(), max_norm=engine.gradient_clipping(), mpu=engine.mpu
        )

    def guarded(*args: Any, **kwargs: Any) -> Any:
        if engine.gradient_clipping() <= 0:  # else clip() came first
            grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            device = grads[0].device if grads else torch.device("cpu")
            optimizer._global_grad_norm = norm_over_processes(grads, device, whole=True)
        optimizer.overflow = not bool(torch.as_tensor(optimizer._global_grad_norm).isfinite())
        return None if optimizer.overflow else step(*args, **kwargs)

    guarded._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # it still is: the schedule need not warn
    engine.clip_fp32_gradients = clip
    optimizer.step = guarded
