"""Events that come before a step: takes them when they are due, and turns scores into a decision."""

from __future__ import annotations

import time
from dataclasses import replace

from salient_ds.engine.reports import EventReport
from salient_ds.engine.state import AllocationState
from salient_ds.heterolora.probe import ProbeData, Prober
from salient_ds.heterolora.probing import ProbingMethod
from salient_ds.ranks import Event


class ProbeEvents:
    """Takes each event of a :class:`ProbingMethod` before the step that it belongs to."""

    def __init__(self, state: AllocationState, data: ProbeData) -> None:
        """
        Args:
            data: the batches that modules are scored on.
        """
        self._state = state
        self.data = data
        self._report: EventReport | None = None

    @property
    def _method(self) -> ProbingMethod:
        method = self._state.method
        assert isinstance(method, ProbingMethod)
        return method

    def take_due(self) -> None:
        """Take the event that is due now, if there is one."""
        event = self._method.probe_due(self._state.step)
        if event is not None:
            self._report = self.take(event) or self._report

    def reported(self) -> EventReport | None:
        """What was decided since the last call; None if nothing was."""
        report, self._report = self._report, None
        return report

    def take(self, event: Event) -> EventReport | None:
        """Score all modules, decide, and apply the decision. Returns None if nothing was decided."""
        state, method, began = self._state, self._method, time.perf_counter()
        prober = Prober(state.engine, state.adapted, state.shards, method.probes, state.device)
        proxy: str | None = method.proxy_of(event)
        while proxy is not None:
            proxy = method.take_probe(event, proxy, prober.score(proxy, self.data))
        probed = time.perf_counter() - began
        report = state.allocate(event)
        return None if report is None else replace(report, gather=report.gather + probed)
