"""What a check finds out about a run. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from salient_ds.check.model_shapes import Architecture
from salient_ds.ranks import RankLayout


@dataclass(frozen=True)
class MemoryInputs:
    """What of model and adapters an estimate of memory needs."""

    base_parameters: int
    layout: RankLayout
    """All adapted modules at their initial ranks."""
    architecture: Architecture | None
    """None for model families whose layers are not known."""
    in_full: int
    """Parameters (elements) that are trained in full."""


@dataclass
class Report:
    """Result of :func:`salient_ds.check.preflight.preflight`."""

    problems: list[str] = field(default_factory=list)
    """What stops the run, one sentence each."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, or is allowed but worth knowing."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts that can be written as JSON. Unknown ones are absent. ``preflight`` lists all of them."""
    memory_inputs: MemoryInputs | None = None
    """None if the model is not known before training."""
