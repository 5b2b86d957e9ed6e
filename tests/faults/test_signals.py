"""Signals at random moments to any process of a launched run: all save the same step, and the run goes on from there.

``pytest -m faults tests/faults/test_signals.py -s`` prints what became of each.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from salient_ds.run.exits import STOPPED
from tests.faults import drills
from tests.launcher import runs

pytestmark = [pytest.mark.faults, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tiny_alpaca: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing happened to."""
    run = runs.write_run(tmp_path_factory.mktemp("whole"), tiny_llama, tiny_alpaca)
    status, output = runs.finish(runs.start(run))
    assert status == 0, output
    return run.parent / "run"


def targets(process: subprocess.Popen[str], draw: random.Random) -> list[int]:
    """One training process, or all of them."""
    found = runs.workers(process.pid)
    return found if draw.random() < 0.3 else found[-draw.randrange(1, 3) :][:1]  # both numbers may come first


def signalled(run: Path, process: subprocess.Popen[str], draw: random.Random, number: signal.Signals) -> str:
    """Send a signal at a random moment of a started run, and say how it ended."""
    if draw.random() < 0.5:
        runs.wait_for_step(run.parent / "run", draw.randrange(1, 20), process)
    else:
        while len(runs.workers(process.pid)) < 2 and process.poll() is None:
            time.sleep(0.05)
        time.sleep(draw.uniform(3, 20))  # while it loads, or when it is nearly done
    for pid in targets(process, draw) if process.poll() is None else []:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    status, output = runs.finish(process)
    assert "Traceback" not in output, output
    if status == STOPPED:
        assert "stopped after step" in output, output
        return f"{number.name}: stopped"
    assert status == 0, (status, output)
    return f"{number.name}: at its end already"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_ten_signals(number: signal.Signals, whole: Path, tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    found: Counter[str] = Counter()
    draw, seed = random.Random(number), 0
    while sum(found.values()) < 10:
        folder = tmp_path / str(seed)
        run = runs.write_run(folder, tiny_llama, tiny_alpaca, train={"save_every": 0})
        for _ in range(draw.randrange(1, 4)):
            found[signalled(run, runs.start(run, "--resume", "auto"), draw, number)] += 1
            print(dict(found), flush=True)
        status, output = runs.finish(runs.start(run, "--resume", "auto"))
        assert status == 0, output
        assert drills.differences(folder / "run", whole) == [] and drills.debris(folder / "run") == []
        seed += 1
    print(dict(found), f"in {seed} runs, all equal to the run without signals")


def test_the_launcher_is_told_to_stop(whole: Path, tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    """TERM to the launcher of the node: it passes the signal on, and the processes save before they end."""
    run = runs.write_run(tmp_path, tiny_llama, tiny_alpaca, train={"save_every": 0})
    process = runs.start(run)
    runs.wait_for_step(tmp_path / "run", 4, process)
    (launch,) = psutil.Process(process.pid).children()
    launch.terminate()
    status, output = runs.finish(process)
    assert status != 0 and "stopped after step" in output and "Traceback" not in output, output
    status, output = runs.finish(runs.start(run, "--resume", "auto"))
    assert status == 0 and "continuing from" in output, output
    assert drills.differences(tmp_path / "run", whole) == []
