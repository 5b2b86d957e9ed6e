"""Gradient clipping inside AdamW's own kernel: a few passes over the gradients and waits for the device less.

To clip, DeepSpeed 0.19.8 reads the norm on the host, once per parameter group, and then scales all gradients. The norm
is on the device, though, and fused AdamW divides gradients by a number that is there too; it is meant for loss scales.

The norm itself DeepSpeed takes of a copy in fp64, and before that it looks at every element whether it is finite,
though a norm tells that as well. Here it is one pass that adds up in fp32. (The host still asks once per step whether
the norm is finite.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from salient_ds.zero.collectives import world
from salient_ds.zero.ds_json import summary

EPS = 1e-6
"""Added to the norm, as DeepSpeed does."""


def can_fold_clipping(ds_config: dict[str, Any], precision: str, fused: bool) -> bool:
    """Whether clipping can be folded: ZeRO-2, our own fused AdamW, and no loss scale that DeepSpeed would divide by."""
    clipped = ds_config.get("gradient_clipping", 0) > 0
    return clipped and fused and precision != "fp16" and summary(ds_config).stage == 2 and "optimizer" not in ds_config


def fold_clipping(engine: Any, bound: float) -> None:
    """Clip at ``bound`` in every step of an engine that was made with ``gradient_clipping`` 0.

    Gradients are clipped once AdamW has run, not before: step post hooks see what they see with DeepSpeed's clipping,
    pre hooks do not. Steps whose norm is not finite are skipped before, by DeepSpeed as ever.
    """
    zero = engine.optimizer
    assert type(zero).__name__ == "DeepSpeedZeroOptimizer" and zero.clip_grad == 0 and zero.loss_scale == 1.0

    def set_scale(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        norm: torch.Tensor = zero._global_grad_norm
        optimizer.grad_scale = ((norm + EPS) / bound).clamp_min(1.0)  # type: ignore[attr-defined]

    engine.basic_optimizer.register_step_pre_hook(set_scale)

    def global_norm(norm_type: int = 2) -> torch.Tensor:
        return norm_over_processes([grad for group in zero.averaged_gradients.values() for grad in group], zero.device)

    zero.scaled_global_norm = global_norm
    zero.check_overflow = lambda partition_gradients=True: None  # the norm is asked next


def norm_over_processes(grads: Sequence[torch.Tensor], device: torch.device | str) -> torch.Tensor:
    """Norm (0-dim, fp32) of gradients of which every process holds a part; not finite if one of them is not."""
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    total = torch.stack([torch.zeros((), device=device), *norms]).square().sum()
    if world().world_size > 1:
        dist.all_reduce(total)
    return total.sqrt()
