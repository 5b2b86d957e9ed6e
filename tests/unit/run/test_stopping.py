"""Requests to end a run early: signals, the time limit, and who counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from salient_ds.run.stopping import SIGNALS, StopRequest


@pytest.fixture
def handlers() -> Iterator[None]:
    """The handlers of this process are put back."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_and_does_not_kill(handlers: None, number: signal.Signals) -> None:
    stop = StopRequest()
    stop.listen()
    assert not stop.asked(is_main=True) and stop.why() == ""
    os.kill(os.getpid(), number)
    assert stop.asked(is_main=False)
    stop.ask("another reason")
    assert stop.why() == f" ({number.name})"


def test_the_clock_of_the_main_process_counts() -> None:
    now = 100.0
    stop = StopRequest(30, clock=lambda: now)
    now = 129.9
    assert not stop.asked(is_main=True)
    now = 130.0
    assert stop.asked(is_main=True) and not stop.asked(is_main=False)
    assert stop.why() == " (train.stop_after=30)"


def test_any_thread_may_ask() -> None:
    stop = StopRequest()
    thread = threading.Thread(target=stop.ask, args=("the launcher has ended",))
    thread.start()
    thread.join()
    assert stop.asked(is_main=False) and stop.why() == " (the launcher has ended)"


def test_a_process_listens_before_it_loads_torch() -> None:
    code = "import sys, salient_ds.train, salient_ds.run.stopping; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
