"""Adapters of a run from its configuration: the same model for training, searching and loading."""

from __future__ import annotations

import torch
from torch import nn

from salient_ds.adapters.inject import AdaptedModel, inject
from salient_ds.adapters.shortcut import ShortcutOptions
from salient_ds.config import AdapterConfig, RunConfig
from salient_ds.method_config import HeteroLoRAConfig


def shortcut_options(adapter: AdapterConfig) -> ShortcutOptions | None:
    """The section ``adapter.shortcuts`` with the adapter's rank where it has none; None without the section."""
    chosen = adapter.shortcuts
    if chosen is None:
        return None
    return ShortcutOptions(
        rank=chosen.rank or adapter.rank,
        modules=tuple(chosen.modules),
        alpha=chosen.alpha,
        dropout=chosen.dropout,
        norm_after_shortcut=chosen.norm_after_shortcut,
    )


def adapt(
    model: nn.Module,
    config: RunConfig,
    dtype: torch.dtype,
    device: torch.device | None = None,
    in_flight: bool = False,
) -> AdaptedModel:
    """Freeze ``model`` and add the run's adapters to it; ``in_flight`` and errors as inject's."""
    switched = isinstance(config.method, HeteroLoRAConfig)
    shortcuts = shortcut_options(config.adapter)
    seed = config.train.seed
    return inject(model, config.adapter, config.method, seed, dtype, device, shortcuts, switched, in_flight)
