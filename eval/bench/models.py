"""The base model with random weights and the run configuration, which all arms share."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from salient_ds.config.run import RunConfig, parse_config
from salient_ds.models.loading import load_model
from salient_ds.zero.ds_json import load_ds_config, resolve_ds_config

from .plan import PLAIN, SPEED, TRAIN, ArmSpec


def run_config(spec: ArmSpec, model_dir: str, method: dict[str, Any]) -> RunConfig:
    """The arm as a run configuration of salient_ds. Its data and output entries are placeholders."""
    settings = spec.settings
    return parse_config({
        "output_dir": "unused", "deepspeed": "unused", "data": {"train": "unused"},
        "model": {"path": model_dir, "random_weights": True, "attn_implementation": settings.attention},
        "adapter": {"rank": spec.rank, "alpha": float(spec.rank)},
        "method": method,
        "speed": {"compile_layers": spec.compiled, "liger": "loss" if spec.fused_loss else "none"}
        | {key: value for option in spec.speed for key, value in SPEED.get(option, {}).items()},
        "train": {key: value for option in spec.speed for key, value in TRAIN.get(option, {}).items()} | {
            "max_steps": 1, "global_batch_size": settings.batch * spec.gpus, "micro_batch_size": settings.batch,
            "precision": settings.precision, "lr": 1e-4, "lr_schedule": "constant", "max_grad_norm": settings.clip,
            "activation_checkpointing": spec.checkpointing, "seed": settings.seed,
        },
    })  # fmt: skip


@contextlib.contextmanager
def model_directory(config: dict[str, Any]) -> Any:
    """A temporary directory that only holds ``config`` as config.json."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield folder


def ds_config(spec: ArmSpec, run: RunConfig, total_steps: int) -> dict[str, Any]:
    """The DeepSpeed JSON for the arm's ZeRO stage, the same for every arm. Empty for the plain loop."""
    if spec.loop == PLAIN:
        return {}
    path = Path(spec.settings.ds_configs) / f"zero{spec.zero}.json"
    raw = {**load_ds_config(path), "steps_per_print": 10**9}
    return resolve_ds_config(raw, run, spec.gpus, total_steps, source=path.name)


def load_base(run: RunConfig, ds: dict[str, Any], device: torch.device) -> nn.Module:
    """Build the model with random weights on ``device``; at ZeRO-3, they are partitioned during construction."""
    torch.manual_seed(run.train.seed)
    partitioned = ds.get("zero_optimization", {}).get("stage") == 3
    with contextlib.nullcontext() if partitioned else device:
        model = load_model(run.model, run.train, ds)
    model.train()
    return model
