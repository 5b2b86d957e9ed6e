"""A run configuration to resolve ZeRO JSONs against."""

from __future__ import annotations

from typing import Any

from salient_ds.config.run import RunConfig, parse_config


def make_run(**train: Any) -> RunConfig:
    """Global batch 16, micro batch 2, bf16, clipping 1.0 unless ``train`` says otherwise."""
    settings = {
        "max_steps": 100,
        "global_batch_size": 16,
        "micro_batch_size": 2,
        "precision": "bf16",
        "lr": 5e-4,
        "weight_decay": 0.01,
    }
    return parse_config(
        {
            "output_dir": "runs/demo",
            "deepspeed": "ds_configs/zero2.json",
            "model": {"path": "models/llama"},
            "adapter": {"rank": 8},
            "method": {"name": "salientlora", "target_rank": 2},
            "data": {"train": "data/alpaca.json"},
            "train": settings | train,
        }
    )
