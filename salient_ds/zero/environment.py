"""Start-up of a process and of an engine: device, process group, and a workaround for DeepSpeed on CPU."""

from __future__ import annotations

import datetime
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from salient_ds.host import free_port
from salient_ds.zero.internals.engine_state import leave_out_shared_memory_collective
from salient_ds.zero.internals.groups import limit_world_clone

_PORTS = 5
"""Ports that a process without a launcher tries. Another process can take a free port before it is bound."""


def start(timeout_minutes: float) -> torch.device:
    """Join the process group that the launcher described, and return this process' device.

    Without a launcher the group has one process.

    On CPU, DeepSpeed's shared-memory collective is switched off. gloo gives the same numbers, while the extension takes
    half a minute to compile on a fresh machine and hangs forever if an earlier build was killed.

    Args:
        timeout_minutes: how long a process waits for the others in a collective.
    """
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    deepspeed.utils.logger.setLevel(os.environ.get("SALIENT_DEEPSPEED_LOG", "WARNING").upper())
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu:
        leave_out_shared_memory_collective()
    else:
        accelerator.set_device(local_rank)
    backend = "gloo" if on_cpu else accelerator.communication_backend_name()
    limit = datetime.timedelta(minutes=timeout_minutes)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        _join_this_attempt(backend, limit)
    attempts = 1 if "MASTER_PORT" in os.environ else _PORTS
    for attempt in range(attempts):
        if attempts > 1:
            os.environ["MASTER_PORT"] = str(free_port())
        try:
            deepspeed.init_distributed(dist_backend=backend, verbose=False, timeout=limit)
            break
        except torch.distributed.DistNetworkError:
            if attempt + 1 == attempts:
                raise
    limit_world_clone(limit)
    return torch.device("cpu") if on_cpu else torch.device(accelerator.device_name(local_rank))


def _join_this_attempt(backend: str, limit: datetime.timedelta) -> None:
    """Join the group of a torchrun worker, with keys of this attempt of its own.

    torchrun's store outlives a restart, and with it the addresses of processes that have ended. PyTorch 2.13 reads them
    under the same keys, so that a restarted process may connect to one that is gone.
    """
    dist: Any = torch.distributed
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"salient/attempt-{attempt}", store), timeout=limit,
        rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]),
    )  # fmt: skip


def make_engine(
    model: nn.Module,
    groups: list[dict[str, Any]],
    optimizer: Callable[[Any], torch.optim.Optimizer] | None,
    scheduler: Callable[[torch.optim.Optimizer], Any],
    ds_config: dict[str, Any],
) -> Any:
    """Call ``deepspeed.initialize`` and return the engine.

    Args:
        groups: parameter groups of the optimizer.
        optimizer: builds the optimizer from the groups; None: DeepSpeed builds the one that ``ds_config`` describes.
        scheduler: builds the learning-rate schedule of an optimizer.
        ds_config: resolved DeepSpeed settings (no "auto" left).
    """
    import deepspeed

    return deepspeed.initialize(
        model=model, model_parameters=groups, optimizer=optimizer, lr_scheduler=scheduler, config=ds_config
    )[0]


def stop() -> None:
    """Leave the process group, so that the backend prints no warnings when the interpreter exits."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
