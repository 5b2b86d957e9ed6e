"""Gradient clipping inside AdamW's own kernel. It saves passes over the gradients and waits for the device.

To clip, DeepSpeed 0.19.8 reads the norm on the host, once per parameter group, and then scales all gradients. Here the
norm stays on the device: fused AdamW can divide gradients by a number on the device, which is meant for loss scales.

DeepSpeed computes the norm from a copy in fp64, after a separate pass that checks whether every element is finite. Here
the norm is one pass that accumulates in fp32, and a norm that is not finite reveals such elements as well. The host
still asks once per step whether the norm is finite.
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
    """Whether clipping can move into the optimizer: ZeRO-2, torch's fused AdamW built by us, and no fp16 loss scale."""
    clipped = ds_config.get("gradient_clipping", 0) > 0
    return clipped and fused and precision != "fp16" and summary(ds_config).stage == 2 and "optimizer" not in ds_config


def fold_clipping(engine: Any, bound: float) -> None:
    """Clip the gradient norm to ``bound`` in every step of an engine that was made with ``gradient_clipping`` 0.

    AdamW's kernel clips the gradients. So step post hooks see clipped gradients, as with DeepSpeed's own clipping, but
    step pre hooks see unclipped ones. DeepSpeed still skips steps whose norm is not finite.
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
    zero.check_overflow = lambda partition_gradients=True: None  # DeepSpeed checks the norm next


def norm_over_processes(grads: Sequence[torch.Tensor], device: torch.device | str, whole: bool = False) -> torch.Tensor:
    """Norm (0-dim, fp32) of gradients that are partitioned over processes; not finite if any element is not.

    Args:
        whole: every process has all gradients, and nothing is summed.
    """
    norms = [torch.linalg.vector_norm(grad, dtype=torch.float32) for grad in grads]
    total = torch.stack([torch.zeros((), device=device), *norms]).square().sum()
    if world().world_size > 1 and not whole:
        dist.all_reduce(total)
    return total.sqrt()
