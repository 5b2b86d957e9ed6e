"""Gradients become fp32 while they are flattened (option ``speed.flat_gradients``).

For every parameter group, DeepSpeed 0.19.8 concatenates the averaged low-precision gradients of this process, and then
converts the result to fp32. Here each gradient is converted into its place in the fp32 tensor: the same values, without
the flat low-precision copy: 2 bytes per adapter parameter at the step, where memory often peaks, and the time to write
and read it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from salient_ds.zero.ds_json import summary


def can_flatten_in_fp32(ds_config: dict[str, Any], precision: str) -> bool:
    """Whether DeepSpeed would flatten low-precision gradients on the device: ZeRO-1 and 2 without optimizer offload."""
    found = summary(ds_config)
    return found.stage in (1, 2) and not found.offload_optimizer and precision != "fp32"


def flatten_in_fp32(engine: Any) -> None:
    """Let the engine's step take over fp32 gradients that are made in one pass.

    Does nothing where DeepSpeed has another optimizer than that of ZeRO-1 and 2, as with ``grad_accum_dtype`` fp32.
    """
    zero = engine.optimizer
    if type(zero).__name__ != "DeepSpeedZeroOptimizer":
        return
    own = zero._get_preflattened_grad_partition

    def flat_partition(group: int) -> Tensor:
        found: Tensor | None = own(group)
        if found is not None:
            return found
        master = zero.single_partition_of_fp32_groups[group]
        return joined(zero.averaged_gradients[group], int(zero.partition_size[group]), master)

    zero._get_preflattened_grad_partition = flat_partition


@torch.no_grad()
def joined(grads: list[Tensor], size: int, like: Tensor) -> Tensor:
    """The gradients one after the other, filled up with zeros to ``size`` elements, in the type of ``like``."""
    out = like.new_empty(size)
    sizes = [grad.numel() for grad in grads]
    *pieces, rest = out.split([*sizes, size - sum(sizes)])
    torch._foreach_copy_(pieces, [grad.reshape(-1) for grad in grads])
    rest.zero_()
    return out
