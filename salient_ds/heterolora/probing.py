"""What a method needs that decides from gradients of probe batches, before a step instead of after one.

Shape legend: M = modules (all rows of a matrix together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from salient_ds.heterolora.results import SearchRecord
from salient_ds.ranks import Event


@dataclass(frozen=True)
class ProbeSettings:
    """How modules are probed."""

    scale_free: bool
    """Divide a module's scaling out of its score."""
    tolerance: float
    """ALPHA-TEST: relative rise of the perplexity that still passes."""


@dataclass(frozen=True)
class ProbeScores:
    """What one probe found, the same on every process."""

    score_M: Tensor
    """float64, CPU; higher is more salient."""
    trained_M: Tensor | None
    """bool, CPU: whether B is anything but zero; None where the proxy does not care."""


@runtime_checkable
class ProbingMethod(Protocol):
    """Further duties of a :class:`~salient_ds.methods.base.Method` whose events come before a step."""

    probes: ProbeSettings
    searches: Sequence[Event]
    """Events of the run; each comes before the step that follows its own."""

    @property
    def record(self) -> SearchRecord:
        """What has been decided so far."""
        ...

    def probe_due(self, step: int) -> Event | None:
        """The event that comes after ``step`` applied steps and before the next forward pass, unless it has been."""
        ...

    def proxy_of(self, event: Event) -> str:
        """Name of the proxy to score all modules with, all of them switched on."""
        ...

    def take_probe(self, event: Event, proxy: str, scores: ProbeScores) -> str | None:
        """Scores for the coming :meth:`allocate`; returns another proxy to try if these decide nothing."""
        ...
