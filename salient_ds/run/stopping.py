"""Ends a run early and whole: a signal or a time limit, a checkpoint of the same step on all processes, one status."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

from salient_ds.strict import Reported
from salient_ds.zero.collectives import world

STOP = "the run is to stop"
"""Flag of the engine: any process may raise it, and all know after the same step."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopped(Reported):
    """The run has saved a checkpoint and ends before its last step. The message says how to go on."""


class StopRequest:
    """Whether this process wants the run to stop."""

    def __init__(self, seconds: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            seconds: time after which the main process asks for the end (``train.stop_after``); None: never.
        """
        self._seconds, self._clock, self._began = seconds, clock, clock()
        self.signal: signal.Signals | None = None
        """The last signal that arrived."""

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR1 as requests from now on. Only the process' main thread may call it."""
        for number in SIGNALS:
            signal.signal(number, self._arrived)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)

    def asked(self) -> bool:
        """Whether a signal has arrived, or the time of the main process is over."""
        over = self._seconds is not None and self._clock() - self._began >= self._seconds
        return self.signal is not None or (over and world().global_rank == 0)
