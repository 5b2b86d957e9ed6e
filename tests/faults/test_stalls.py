"""Processes that stop answering: the others end within ``train.timeout_minutes`` and 30 s, and say who it was.

``pytest -m faults tests/faults/test_stalls.py -s`` prints counts and the longest time.
"""

from __future__ import annotations

import random
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from salient_ds.run.exits import RUN_ERROR
from tests.faults import drills
from tests.launcher import runs

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000)]

MINUTES = 0.1


@pytest.fixture
def groups() -> Iterator[list[drills.Group]]:
    """Started groups; their processes are ended."""
    started: list[drills.Group] = []
    yield started
    for group in started:
        group.kill()


def noticed(group: drills.Group, stopped: int, draw: random.Random, number: signal.Signals = signal.SIGSTOP) -> float:
    """Stop one process at a random moment. Returns the seconds until the other one has ended with an error."""
    group.wait_for_step(draw.randrange(1, 15))
    time.sleep(draw.uniform(0, 0.5))
    other = 1 - stopped
    group.signal(stopped, number)
    began = time.monotonic()
    assert group.end_of(other, 60 * MINUTES + 30) == RUN_ERROR, group.output()
    text = group.output(other)
    assert "Traceback" not in text, text
    said = [line for line in text.splitlines() if line.startswith("error")]
    assert len(said) == 1, text
    assert f"process {stopped} on {socket.gethostname()}, last heard of in" in said[0], said
    assert "is in step" in said[0] or "failed in step" in said[0], said
    assert "--resume auto" in said[0]
    return time.monotonic() - began


@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL])
def test_twenty_silent_processes(
    number: signal.Signals, groups: list[drills.Group], tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path
) -> None:
    draw, times = random.Random(3), []
    for count in range(20):
        train = {"max_steps": 100_000, "timeout_minutes": MINUTES, "save_every": "2s"}
        run = runs.write_run(tmp_path / str(count), tiny_llama, tiny_alpaca, train=train)
        groups.append(drills.Group.start(run))
        times.append(noticed(groups[-1], count % 2, draw, number))
        groups.pop().kill()
    print(f"{number.name}: {len(times)} of 20 noticed, the last after {max(times):.1f} s of {60 * MINUTES + 30:.0f} s")
