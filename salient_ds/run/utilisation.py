"""MFU of a run: the share of its peak rate that this process' device spends on what the model needs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from salient_ds.config.train import TrainConfig
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.engine.reports import MicroBatch
from salient_ds.models.flops import ModelFlops, NotCounted, count_flops
from salient_ds.monitor.device_peak import device_peak


class Utilisation:
    """MFU of steps of this process, or why there is none."""

    def __init__(self, engine: AllocatingEngine, train: TrainConfig, device: torch.device) -> None:
        self.engine = engine
        self.note: str | None = None
        """Why there is no MFU, for the user; None: there is one."""
        self._flops: ModelFlops | None = None
        self._latest: tuple[Any, int] = (None, 0)
        """The decision that counts, and what the adapters cost with its rows."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        peak = device_peak(name, train.precision) if train.peak_tflops is None else train.peak_tflops * 1e12
        self.peak = peak or 0.0
        """FLOP/s of this process' device."""
        if peak is None and device.type == "cpu":
            return  # nobody looks for it there
        if peak is None:
            self.note = f"no MFU: the peak of {name} in {train.precision} is not known (train.peak_tflops states it)"
            return
        try:
            self._flops = count_flops(engine.adapted.model, engine.adapted.adapters)
        except NotCounted as why:
            self.note = f"no MFU: the operations of this model are not counted, because {why}"

    def flops(self, batches: Sequence[MicroBatch]) -> int | None:
        """Operations of this process in a step; None if they are not counted."""
        if self._flops is None:
            return None
        decision = self.engine.decisions.latest
        if self._latest[0] is not decision:
            self._latest = decision, self._flops.adapters(decision.ranks(self.engine.adapted.layout))
        lengths = [length for batch in batches for length in batch.lengths]
        return self._flops.step(lengths, sum(batch.num_targets for batch in batches), self._latest[1])

    def of(self, batches: Sequence[MicroBatch], seconds: float) -> float | None:
        """MFU of a step that took ``seconds``, from 0 to 1; None if it is not known."""
        flops = self.flops(batches)
        return None if flops is None else flops / (self.peak * max(seconds, 1e-9))
