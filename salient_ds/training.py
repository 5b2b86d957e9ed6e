"""Old import path of :mod:`salient_ds.run.training`; it goes with version 1.0."""

from __future__ import annotations

from salient_ds.run.training import Training

__all__ = ["Training"]
