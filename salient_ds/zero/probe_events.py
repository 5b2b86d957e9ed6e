"""Events that come before a step: when they are due, and how scores become a decision."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from salient_ds.methods.probing import ProbingMethod
from salient_ds.salience.budget import Event
from salient_ds.zero.probe import ProbeData, Prober

if TYPE_CHECKING:
    from salient_ds.zero.engine import AllocatingEngine
    from salient_ds.zero.reports import EventReport


class ProbeEvents:
    """Takes the events of a :class:`ProbingMethod` before the steps that they belong to."""

    def __init__(self, owner: AllocatingEngine) -> None:
        self._owner = owner
        self.data: ProbeData | None = None
        """To be set before training."""
        self._report: EventReport | None = None

    def take_due(self) -> None:
        """An event that is due now, if there is one."""
        method = self._owner.method
        event = method.probe_due(self._owner.step) if isinstance(method, ProbingMethod) else None
        if event is not None:
            self._report = self.take(event) or self._report

    def reported(self) -> EventReport | None:
        """What was decided since the last applied step, once."""
        report, self._report = self._report, None
        return report

    def take(self, event: Event) -> EventReport | None:
        """Score all modules, decide, apply; None if nothing was decided."""
        owner, method, began = self._owner, self._owner.method, time.perf_counter()
        assert isinstance(method, ProbingMethod) and self.data is not None, "a method that probes needs batches"
        prober = Prober(owner.engine, owner.adapted, owner.shards, method.probes, owner.device)
        proxy: str | None = method.proxy_of(event)
        while proxy is not None:
            proxy = method.take_probe(event, proxy, prober.score(proxy, self.data))
        probed = time.perf_counter() - began
        report = owner._allocate(event)
        return None if report is None else replace(report, gather=report.gather + probed)
