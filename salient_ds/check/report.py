"""What a check finds out about a run. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Report:
    """Result of :func:`salient_ds.check.preflight.preflight`."""

    problems: list[str] = field(default_factory=list)
    """Whatever stops the run, one sentence each."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, or is allowed but worth knowing."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was found out, JSON-able; a fact that could not be found out is absent (the list: ``preflight``)."""
