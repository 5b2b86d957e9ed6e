"""The one table of methods: type of the configuration -> constructor of the object that decides."""

from __future__ import annotations

from collections.abc import Callable

from salient_ds.method_config import (
    AdaLoRAConfig,
    HeteroLoRAConfig,
    IncreLoRAConfig,
    LoRA2Config,
    LoRAConfig,
    MethodConfig,
    SalientLoRAConfig,
)
from salient_ds.methods.adalora import AdaLoRA
from salient_ds.methods.base import Method, RankLayout
from salient_ds.methods.heterolora import HeteroLoRA
from salient_ds.methods.increlora import IncreLoRA
from salient_ds.methods.lora import LoRA
from salient_ds.methods.lora2 import LoRA2
from salient_ds.methods.salientlora import SalientLoRA
from salient_ds.salience.learning_rate import RatePlan

METHODS: dict[type, Callable[..., Method]] = {
    SalientLoRAConfig: SalientLoRA,
    AdaLoRAConfig: AdaLoRA,
    LoRA2Config: LoRA2,
    LoRAConfig: lambda config, layout, total_steps: LoRA(),
}


def build_method(
    config: MethodConfig,
    layout: RankLayout,
    total_steps: int,
    rates: RatePlan | None = None,
    steps_per_epoch: int | None = None,
) -> Method:
    """The method of a run.

    Args:
        rates: the learning-rate schedule, for methods that give single rows their own.
        steps_per_epoch: for methods whose events are given in epochs.

    Raises:
        ValueError: if its schedule has no event, with the numbers and the ways out.
    """
    if isinstance(config, IncreLoRAConfig):
        return IncreLoRA(config, layout, total_steps, rates)
    if isinstance(config, HeteroLoRAConfig):
        return HeteroLoRA(config, layout, total_steps, steps_per_epoch)
    return METHODS[type(config)](config, layout, total_steps)
