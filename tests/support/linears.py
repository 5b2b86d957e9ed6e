"""The linear layers of a model that adapters may wrap."""

from __future__ import annotations

from torch import nn

from salient_ds.adapters.survey import linear, survey


def linear_modules(model: nn.Module) -> dict[str, nn.Linear]:
    """Layers by path, as a survey of the model lists them."""
    return {path: linear(model, path) for path in survey(model).linears}
