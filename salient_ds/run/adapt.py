"""Adds the adapters that a run's configuration describes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from salient_ds.adapters.inject import AdaptedModel, inject
from salient_ds.adapters.survey import ShapeOf, whole_shape
from salient_ds.config.run import RunConfig
from salient_ds.heterolora.injection import add_shortcuts


def adapt(
    model: nn.Module,
    config: RunConfig,
    dtype: torch.dtype,
    device: torch.device | None = None,
    in_flight: bool = False,
    shape_of: ShapeOf = whole_shape,
    fresh: Sequence[str] = (),
) -> AdaptedModel:
    """Freeze ``model`` and add the run's adapters and shortcuts to it, in place.

    Args:
        in_flight, shape_of, fresh: see :func:`salient_ds.adapters.inject.inject`.

    Raises:
        ValueError: as :func:`~salient_ds.adapters.inject.inject` and
            :func:`~salient_ds.heterolora.injection.add_shortcuts`.
    """
    adapter, seed = config.adapter, config.train.seed
    adapted = inject(
        model, adapter, config.method, seed, dtype, device, in_flight=in_flight, shape_of=shape_of, fresh=fresh
    )
    if adapter.shortcuts is not None:
        add_shortcuts(adapted, adapter, seed, dtype, device)
    return adapted
