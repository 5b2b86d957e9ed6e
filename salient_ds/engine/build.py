"""Builds the optimizer, the learning-rate schedule and the DeepSpeed engine of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.config.train import TrainConfig
from salient_ds.salience.learning_rate import RatePlan
from salient_ds.steps import steps_or_fraction
from salient_ds.zero.collectives import world
from salient_ds.zero.ds_json import summary
from salient_ds.zero.environment import make_engine
from salient_ds.zero.internals.clipping import can_fold_clipping, fold_clipping
from salient_ds.zero.internals.flat_gradients import can_flatten_in_fp32, flatten_in_fp32
from salient_ds.zero.internals.layouts import full_shape
from salient_ds.zero.internals.skipping import skip_non_finite


def parameter_groups(adapted: AdaptedModel, lr: float, weight_decay: float, sigma_ratio: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into groups: factors, singular values, and modules that are trained in full.

    The singular values have a group of their own so that they lie side by side in the optimizer's flat buffer. One
    slice then reads or masks them all. Their learning rate is ``lr`` times ``sigma_ratio``. They are not decayed, nor
    are the biases and norms of modules.
    """
    sigmas = {
        id(address.parameter)
        for adapter in adapted.adapters.values()
        for factor, address in adapter.factors().items()
        if factor == "E"
    }
    modules = adapted.names_in_full
    trainable = [p for p in adapted.trained.parameters() if p.requires_grad]
    in_full = [p for p in trainable if id(p) in modules]
    groups = [
        {
            "params": [p for p in trainable if id(p) not in sigmas and id(p) not in modules],
            "weight_decay": weight_decay,
            "name": "factors",
        },
        {
            "params": [p for p in trainable if id(p) in sigmas],
            "lr": lr * sigma_ratio,
            "weight_decay": 0.0,
            "name": "singular_values",
        },
        {
            "params": [p for p in in_full if len(full_shape(p)) > 1],
            "weight_decay": weight_decay,
            "name": "modules",
        },
        {
            "params": [p for p in in_full if len(full_shape(p)) <= 1],
            "weight_decay": 0.0,
            "name": "modules_not_decayed",
        },
    ]
    return [group for group in groups if group["params"]]


def optimizer_factory(train: TrainConfig, fused: bool) -> Callable[[Any], torch.optim.Optimizer]:
    """A function that builds AdamW, for ZeRO JSON files without an ``optimizer`` section.

    Args:
        fused: use torch's fused kernel.
    """

    def build(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=fused or None)

    return build


def scheduler_factory(train: TrainConfig, total_steps: int) -> Callable[[torch.optim.Optimizer], LRScheduler]:
    """A function that builds the learning-rate schedule over applied steps."""
    from transformers.optimization import get_scheduler

    warmup = steps_or_fraction(train.lr_warmup, total_steps)
    name = "constant_with_warmup" if train.lr_schedule == "constant" else train.lr_schedule

    def build(optimizer: torch.optim.Optimizer) -> LRScheduler:
        schedule: LRScheduler = get_scheduler(name, optimizer, warmup, total_steps)
        return schedule

    return build


def rate_plan(train: TrainConfig, total_steps: int) -> RatePlan:
    """The same schedule as plain numbers, for methods whose late rows get their own learning rate."""
    warmup = steps_or_fraction(train.lr_warmup, total_steps)
    return RatePlan(train.lr_schedule, warmup, total_steps, train.betas, train.weight_decay)


def build_engine(
    adapted: AdaptedModel,
    train: TrainConfig,
    ds_config: dict[str, Any],
    total_steps: int,
    device: torch.device,
    folding: bool = False,
    *,
    sigma_ratio: float,
    flat_gradients: bool = False,
) -> Any:
    """Call ``deepspeed.initialize`` on the adapted model and return the engine.

    Args:
        ds_config: resolved DeepSpeed settings (no "auto" left). If a
            :class:`salient_ds.zero.sharded_base.ShardedBase` holds the base, pass them through
            :func:`salient_ds.zero.sharded_base.adapter_config` first.
        total_steps: applied optimizer steps of the run.
        sigma_ratio: learning rate of singular values, as a multiple of ``train.lr``.
        flat_gradients: convert gradients to fp32 while they are flattened, where DeepSpeed does one after the other
            (:mod:`salient_ds.zero.internals.flat_gradients`).
        folding: clip inside the optimizer's kernel where possible (:mod:`salient_ds.zero.internals.clipping`).
    """
    fused = uses_fused_optimizer(ds_config, device)
    own = None if "optimizer" in ds_config else optimizer_factory(train, fused)
    folding = folding and can_fold_clipping(ds_config, train.precision, fused)
    bound = float(ds_config["gradient_clipping"]) if folding else 0.0
    if bound:
        ds_config = ds_config | {"gradient_clipping": 0.0}
    if world().world_size == 1:  # nothing to overlap, and with overlap_comm DeepSpeed waits for the device per bucket
        zero = ds_config.get("zero_optimization", {})
        ds_config = ds_config | {"zero_optimization": zero | {"overlap_comm": False}}
    engine = make_engine(
        adapted.trained,
        parameter_groups(adapted, train.lr, train.weight_decay, sigma_ratio),
        own,
        scheduler_factory(train, total_steps),
        ds_config,
    )
    if bound:
        fold_clipping(engine, bound)
    if flat_gradients and can_flatten_in_fp32(ds_config, train.precision):
        flatten_in_fp32(engine)
    skip_non_finite(engine)
    return engine


def uses_fused_optimizer(ds_config: dict[str, Any], device: torch.device) -> bool:
    """Whether AdamW uses its fused kernel: on CUDA devices, unless the optimizer is offloaded."""
    return device.type == "cuda" and not summary(ds_config).offload_optimizer
