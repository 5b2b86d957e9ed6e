"""What a check finds out about a run. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """Result of :func:`salient_ds.check.preflight.preflight`."""

    problems: list[str] = field(default_factory=list)
    """What stops the run, one sentence each."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, or is allowed but worth knowing."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Facts that can be written as JSON. Unknown ones are absent. ``preflight`` lists all of them."""
