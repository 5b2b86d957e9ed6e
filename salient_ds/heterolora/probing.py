"""Interface of methods that decide before a step, from the gradients of probe batches.

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
    """Divide each score by the module's scaling."""
    tolerance: float
    """t of the ALPHA-TEST's limit m + t / m (:meth:`salient_ds.heterolora.proxies.MetricLimit.of`)."""


@dataclass(frozen=True)
class ProbeScores:
    """Result of one probe, the same on every process."""

    score_M: Tensor
    """float64, CPU; higher is more salient."""
    trained_M: Tensor | None
    """bool, CPU: True where B is not all zero. None for proxies that do not need to know."""


@runtime_checkable
class ProbingMethod(Protocol):
    """Further duties of a :class:`~salient_ds.methods.duties.Method` whose events come before a step."""

    probes: ProbeSettings
    searches: Sequence[Event]
    """Events of the run. One with ``step`` s is taken after s applied steps, before step s + 1."""

    @property
    def record(self) -> SearchRecord:
        """What has been decided so far."""
        ...

    def probe_due(self, step: int) -> Event | None:
        """The event due after ``step`` applied steps, before the next forward pass. None if it has been taken."""
        ...

    def proxy_of(self, event: Event) -> str:
        """Name of the proxy that scores the modules at this event. All modules are on while they are scored."""
        ...

    def take_probe(self, event: Event, proxy: str, scores: ProbeScores) -> str | None:
        """Receive the scores for the next ``allocate``. Returns another proxy to try if these cannot decide."""
        ...
