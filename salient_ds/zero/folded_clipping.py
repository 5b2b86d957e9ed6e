"""Gradient clipping inside AdamW's own kernel: one pass over the gradients and a few waits for the device less.

To clip, DeepSpeed 0.19.8 reads the norm on the host, once per parameter group, and then scales all gradients. The norm
is on the device, though, and fused AdamW divides gradients by a number that is there too; it is meant for loss scales.
(The host still asks once per step whether gradients are finite.)
"""

from __future__ import annotations

from typing import Any

import torch

from salient_ds.zero.config import summary

EPS = 1e-6
"""Added to the norm, as DeepSpeed does."""


def folds(ds_config: dict[str, Any], precision: str, fused: bool) -> bool:
    """Whether clipping can be folded: ZeRO-2, our own fused AdamW, and no loss scale that DeepSpeed would divide by."""
    clipped = ds_config.get("gradient_clipping", 0) > 0
    return clipped and fused and precision != "fp16" and summary(ds_config).stage == 2 and "optimizer" not in ds_config


def fold(engine: Any, bound: float) -> None:
    """Clip at ``bound`` in every step of an engine that was made with ``gradient_clipping`` 0.

    Gradients are clipped once AdamW has run, not before: step post hooks see what they see with DeepSpeed's clipping,
    pre hooks do not. Steps whose norm is not finite are skipped before, as they are there.
    """
    zero = engine.optimizer
    assert type(zero).__name__ == "DeepSpeedZeroOptimizer" and zero.clip_grad == 0 and zero.loss_scale == 1.0

    def set_scale(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        norm: torch.Tensor = zero._global_grad_norm
        optimizer.grad_scale = ((norm + EPS) / bound).clamp_min(1.0)  # type: ignore[attr-defined]

    engine.basic_optimizer.register_step_pre_hook(set_scale)
