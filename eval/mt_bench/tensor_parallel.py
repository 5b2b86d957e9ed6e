"""Split one model over the GPUs of a launcher run, with DeepSpeed's automatic tensor parallelism."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def join_group(timeout_minutes: float) -> None:
    """Join the launcher's process group through DeepSpeed."""
    from salient_ds.zero.environment import start

    start(timeout_minutes)


def split_model(model: nn.Module, dtype: torch.dtype) -> Any:
    """Split the model's linear layers over all processes of the group, on their devices.

    Afterwards every process has to run the same batches.

    Raises:
        ValueError: DeepSpeed cannot split this architecture over this number of processes.
    """
    import deepspeed
    import torch.distributed as dist

    size = {"tp_size": dist.get_world_size()}
    try:
        engine = deepspeed.init_inference(model, tensor_parallel=size, dtype=dtype, replace_with_kernel_inject=False)
    except (AssertionError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"DeepSpeed cannot split {type(model).__name__} over {size['tp_size']} processes: {error}"
        ) from error
    return engine.module
