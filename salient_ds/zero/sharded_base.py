"""ZeRO-3 for the frozen base alone: an engine without optimizer gathers it layer by layer, adapters stay outside.

The base never changes, so all that ZeRO-3 has to do is fetch a layer before it runs and drop it afterwards. Adapters
live in banks beside the model, replicated in training precision, and belong to a second, ordinary ZeRO-2 engine over
both, which partitions masters and moments. Against one ZeRO-3 engine for everything this takes away most hooks: a layer
is gathered as a whole (leaf module), not one linear layer at a time.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from salient_ds.adapters.bank import layer_of
from salient_ds.config import RunConfig
from salient_ds.speed_config import shards_base
from salient_ds.zero.config import summary

ADAPTER_STAGE = 2
BASE_KEYS = ("offload_param", "sub_group_size")
"""Keys of ``zero_optimization`` that concern the base only, besides those that begin with ``stage3_`` or ``zero_``."""


class ShardedBase:
    """The partitioned base of a model, gathered by hooks on its layers."""

    def __init__(self, model: nn.Module, ds_config: dict[str, Any]) -> None:
        """Partition ``model`` (loaded under ZeRO-3, without adapters) and hook its layers.

        Args:
            ds_config: resolved DeepSpeed settings of stage 3.
        """
        import deepspeed
        from deepspeed.utils import set_z3_leaf_module

        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for layer in layers_of(model):
            set_z3_leaf_module(layer, True)
        engine = deepspeed.initialize(model=model, config=base_config(ds_config))[0]
        # The engine itself never runs: only the hooks that its offload object put on the layers are wanted.
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        self._engine = engine

    def release(self) -> None:
        """Drop what a backward pass has left gathered (recomputed layers are gathered once more than they are used)."""
        self._engine.optimizer.release_backward_leftovers()


def effective_config(ds_config: dict[str, Any], config: RunConfig, processes: int) -> dict[str, Any]:
    """Settings that the run really needs: on a single process ZeRO-3 has nothing to divide a base by.

    Without parameter offload the base then stays whole, as at stage 2, and nothing is gathered or dropped. Everything
    else, checkpoints included, is the same.
    """
    plan = summary(ds_config)
    sharded = shards_base(config.speed, config.method.name, plan.stage, config.adapter.shortcuts is not None)
    if sharded and processes == 1 and not plan.offload_param:
        return adapter_config(ds_config)
    return ds_config


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Modules that are gathered as a whole: the elements of the model's module lists."""
    paths = {layer_of(path) for path, _ in model.named_modules()} - {""}
    return [model.get_submodule(path) for path in sorted(paths)]


def base_config(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the engine without optimizer."""
    base = copy.deepcopy(ds_config)
    for section in ("optimizer", "scheduler"):
        base.pop(section, None)
    base["zero_optimization"].pop("offload_optimizer", None)
    return base


def adapter_config(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the engine that owns the adapters: the same at stage 2, without what concerns the base."""
    own = copy.deepcopy(ds_config)
    zero = own["zero_optimization"]
    for key in [k for k in zero if k in BASE_KEYS or k.startswith(("stage3_", "zero_"))]:
        del zero[key]
    zero["stage"] = ADAPTER_STAGE
    return own
