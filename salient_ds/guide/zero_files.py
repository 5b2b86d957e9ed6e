"""The plain DeepSpeed JSON files that ``salient-ds init`` writes: those of ds_configs/, which a test compares."""

from __future__ import annotations

import json
from typing import Any

_AUTO = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_HOST = {"device": "cpu", "pin_memory": True}
_ZERO_2: dict[str, Any] = {
    "stage": 2,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 200_000_000,
    "allgather_partitions": True,
    "allgather_bucket_size": 200_000_000,
}
_ZERO_3: dict[str, Any] = {
    "stage": 3,
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
    "sub_group_size": 1_000_000_000,
}
FILES: dict[str, dict[str, Any]] = {
    "cpu": {
        "stage": 2,
        "overlap_comm": False,
        "contiguous_gradients": True,
        "reduce_bucket_size": 5_000_000,
        "allgather_bucket_size": 5_000_000,
    },
    "zero2": _ZERO_2,
    "zero2_offload": {**_ZERO_2, "offload_optimizer": _HOST},
    "zero3": _ZERO_3,
    "zero3_offload": {**_ZERO_3, "offload_optimizer": _HOST, "offload_param": _HOST},
}
"""Name -> section zero_optimization."""


def zero_text(name: str) -> str:
    """The text of one file. ``name`` is a key of :data:`FILES`."""
    auto: dict[str, Any] = dict.fromkeys(_AUTO, "auto")
    precision = {kind: {"enabled": "auto"} for kind in ("bf16", "fp16")}
    return json.dumps({**auto, **precision, "zero_optimization": FILES[name]}, indent=2) + "\n"
