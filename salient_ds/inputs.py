"""Old import path of :mod:`salient_ds.run.inputs`; it goes with version 1.0."""

from __future__ import annotations

from typing import Any

from salient_ds.run import inputs
from salient_ds.run.inputs import Inputs, evaluation_batches, load_inputs, probe_data

__all__ = ["Inputs", "evaluation_batches", "load_inputs", "micro_batches", "probe_data"]


def micro_batches(sources: Inputs, sampler: Any, batch: int, rank: int, world_size: int, size: int, device: Any) -> Any:
    """As :func:`salient_ds.run.inputs.micro_batches`, with positional arguments."""
    return inputs.micro_batches(
        sources, sampler, batch, global_rank=rank, world_size=world_size, size=size, device=device
    )
