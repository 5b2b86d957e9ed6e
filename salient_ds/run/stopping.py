"""Ends a run early and whole: a signal or a time limit, a checkpoint of the same step on all processes, one status.

Imports no torch, so that a process listens before it has loaded anything: the default action of SIGUSR1 is to kill.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

from salient_ds.strict import Reported

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
            seconds: time after which the main process asks for the end (``train.stop_after``); None: never. It counts
                from here.
        """
        self.seconds = seconds
        self.reason: str | None = None
        """Why this process asks, apart from the time: the first signal that arrived, or what :meth:`ask` was given."""
        self._clock, self._began = clock, clock()

    def listen(self) -> None:
        """Take SIGTERM and SIGUSR1 as requests from now on. Only the process' main thread may call it."""
        for number in SIGNALS:
            signal.signal(number, self._arrived)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)

    def ask(self, reason: str) -> None:
        """Ask for the end. Any thread may call it."""
        self.reason = self.reason or reason

    def asked(self, is_main: bool) -> bool:
        """Whether a signal has arrived, or the time of the main process is over."""
        return self.reason is not None or (is_main and self._over())

    def _over(self) -> bool:
        return self.seconds is not None and self._clock() - self._began >= self.seconds

    def why(self) -> str:
        """What this process knows of the reason, as the end of a sentence; empty if another process asked."""
        if self.reason is not None:
            return f" ({self.reason})"
        return f" (train.stop_after={self.seconds:g})" if self._over() else ""
