"""Base models: loading, attention, kernels of other libraries."""


def __getattr__(name: str) -> object:
    """Old import path: what was in ``salient_ds/models.py`` is in ``models/loading.py``; it goes with version 1.0."""
    from importlib import import_module

    if name.startswith("_"):
        raise AttributeError(name)
    return getattr(import_module("salient_ds.models.loading"), name)
