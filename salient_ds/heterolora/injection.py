"""Add the shortcuts of section ``adapter.shortcuts`` to a model whose linear layers are adapted already."""

from __future__ import annotations

from typing import Any, cast

import torch

from salient_ds.adapters.inject import AdaptedModel, layout_of, module_generator
from salient_ds.adapters.options import AdapterConfig
from salient_ds.adapters.targets import select_shortcuts
from salient_ds.heterolora.shortcut import Shortcut, ShortcutKind
from salient_ds.heterolora.shortcut_wiring import shortcut_names, wire_shortcuts


def add_shortcuts(
    adapted: AdaptedModel, adapter: AdapterConfig, seed: int, dtype: torch.dtype, device: torch.device | None = None
) -> None:
    """Wire the shortcuts into the layers of ``adapted.model``, in place.

    In ``adapted.layout`` the shortcuts follow all linear layers. New shortcuts leave the model's output unchanged,
    unless ``norm_after_shortcut`` is "reuse".

    Raises:
        ValueError: shortcuts are not defined for this model, or a name in ``adapter.shortcuts.modules`` matches none.
    """
    options = adapter.shortcuts
    assert options is not None, "there is no section adapter.shortcuts"
    model: Any = adapted.model
    size, rank = model.config.get_text_config().hidden_size, options.rank or adapter.rank
    added = {}
    for name in select_shortcuts(shortcut_names(model), options.modules):
        kind, generator = cast(ShortcutKind, name.rpartition(".")[2]), module_generator(seed, name)
        added[name] = Shortcut(
            kind,
            size,
            rank,
            options.alpha / rank,
            dropout=options.dropout,
            generator=generator,
            dtype=dtype,
            device=device,
        )
        if device is not None:
            added[name].rank_mask_R = added[name].rank_mask_R.to(device)
    wire_shortcuts(model, added, options.norm_after_shortcut)
    adapted.adapters.update(added)
    adapted.layout = layout_of(adapted.adapters)
