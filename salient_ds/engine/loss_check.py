"""Checks that the loss of a step is finite on every process, before parameters change and without stalling the device.

The loss depends on the forward pass only. It is copied to the host while the backward pass runs, so that waiting for it
does not mean waiting for the gradients. Flags travel with it: what one process notices (time to save, a signal), all
processes know after the same step, at no further collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from salient_ds.zero.collectives import world


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step, as all processes know it."""

    loss: float
    """Mean loss over the targets of the global batch."""
    broken: bool
    """The loss of at least one process is not finite."""
    broken_here: bool
    """The loss of this process is not finite."""
    flags: tuple[bool, ...] = ()
    """Of every flag, whether at least one process raised it."""


class LossCheck:
    """Sums the loss over micro-batches and processes.

    Args:
        device: where the losses are.
        global_targets: number of targets in the whole global batch.
        flags: those that this process raises; as many on every process.
    """

    def __init__(self, device: torch.device, global_targets: int, flags: Sequence[bool] = ()) -> None:
        self._targets = max(global_targets, 1)
        self._flags = torch.tensor(list(map(float, flags)), dtype=torch.float64)
        self._total = torch.zeros((), dtype=torch.float64, device=device)
        self._host: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None

    def add(self, loss: Tensor, num_targets: int) -> None:
        """Add one micro-batch: its mean loss over ``num_targets`` targets."""
        if num_targets:
            self._total += loss.detach().double() * num_targets

    def start(self) -> None:
        """Combine the sums of all processes. Call it after the last forward pass and before its backward pass."""
        finite = self._total.isfinite()
        broken = (~finite).double()
        numbers = torch.stack([torch.where(finite, self._total, 0.0) / self._targets, broken])
        if len(self._flags):
            numbers = torch.cat([numbers, self._flags.to(self._total.device, non_blocking=True)])
        if world().world_size > 1:
            dist.all_reduce(numbers)
        numbers = torch.cat([numbers, broken.view(1)])
        if not numbers.is_cuda:
            self._host = numbers
            return
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._host.copy_(numbers, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record()

    def finish(self) -> StepLoss:
        """Wait for the combined numbers and return them."""
        assert self._host is not None, "start() comes first"
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, broken, *flags, here = self._host.tolist()
        return StepLoss(loss, broken > 0, here > 0, tuple(count > 0 for count in flags))
