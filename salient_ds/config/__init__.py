"""Configuration of a run: typed sections, read from YAML."""


def __getattr__(name: str) -> object:
    """Old import path: what was in ``salient_ds/config.py`` is in ``config/run.py``; it goes with version 1.0."""
    from importlib import import_module

    if name.startswith("_"):
        raise AttributeError(name)
    return getattr(import_module("salient_ds.config.run"), name)
