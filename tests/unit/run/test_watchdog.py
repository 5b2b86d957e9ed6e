"""When the watchdog ends a process, and what it says. Time is set by hand."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from salient_ds.run import watchdog
from salient_ds.run.heartbeats import Peer
from salient_ds.run.launcher_alive import Launcher
from salient_ds.run.stopping import StopRequest
from salient_ds.run.watchdog import Watchdog
from salient_ds.run.whereabouts import Whereabouts

ALONE = Launcher(())


@dataclass
class Beats:
    """What a process knows of the others."""

    peers: dict[int, Peer]
    global_rank: int = 0
    interval: float = 0.01
    verdict: str | None = None
    told: list[str] = field(default_factory=list)

    def condemn(self, message: str) -> None:
        self.told.append(message)

    def read_all(self) -> dict[int, Peer]:
        return self.peers


class Ended(Exception):
    """The process would have ended here."""


def end(status: int) -> None:
    raise Ended(status)


def peer(host: str, silent: float = 0.0, place: str = "step 7", there: float = 0.0) -> Peer:
    now = time.monotonic()
    return Peer(host, place, "1", now - silent, now - there)


def dog(beats: Beats | None, stop: StopRequest | None = None, launcher: Launcher = ALONE) -> Watchdog:
    where = Whereabouts()
    where.at(lambda: "step 8 (allocating ranks)")
    return Watchdog(beats, 60.0, where, stop, launcher, end)


def test_nothing_happens_while_all_answer() -> None:
    dog(Beats({0: peer("a"), 1: peer("b", silent=59.0)})).look()
    dog(Beats({0: peer("a", silent=59.0)}, global_rank=3)).look()
    dog(None).look()


def test_the_main_process_names_the_silent_ones_and_tells_all(capsys: pytest.CaptureFixture[str]) -> None:
    beats = Beats({0: peer("a"), 1: peer("b", silent=61.0, place="loading the data"), 2: peer("c")})
    with pytest.raises(Ended, match="1"):
        dog(beats).look()
    said = capsys.readouterr().err
    assert said == (
        "error: process 1 on b, last heard of in loading the data, has not answered for 1 minutes "
        "(train.timeout_minutes). Process 0 is in step 8 (allocating ranks). --resume auto continues from the last "
        "checkpoint\n"
    )
    assert beats.told == [said.removeprefix("error: ").partition(". Process")[0]]


def test_several_silent_processes_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    peers = {rank: peer(f"n{rank // 8}", silent=61.0 if rank >= 8 else 0.0) for rank in range(100)}
    with pytest.raises(Ended):
        dog(Beats(peers)).look()
    said = capsys.readouterr().err
    assert said.startswith(
        "error: 92 processes on n1, n2, n3, n4, n5, n6, n7, n8 and 4 more have not answered (process 8 was "
    )


def test_a_silent_main_process_is_named_by_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Ended):
        dog(Beats({0: peer("a", silent=61.0)}, global_rank=1)).look()
    assert "process 0 on a, last heard of in step 7, has not answered for 1 minutes" in capsys.readouterr().err
    monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("LOCAL_RANK", "5")
    with pytest.raises(Ended):
        dog(Beats({0: peer("a", silent=61.0)}, global_rank=5)).look()
    assert capsys.readouterr().err == ""  # one per node is enough


def test_a_process_that_keeps_the_others_waiting_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """It beats, but its main thread stands still; a collective of its own would have ended before."""
    waiting = {rank: peer("a", place="step 8 (forward and backward)", there=74.0) for rank in range(3)}
    late = peer("b", place="step 8 (reading rows)", there=74.0)
    dog(Beats(waiting | {3: late})).look()
    waiting = {rank: peer("a", place="step 8 (forward and backward)", there=76.0) for rank in range(3)}
    dog(Beats(waiting | {3: late})).look()  # it moved 74 s ago
    dog(Beats(waiting)).look()  # all are in the same place: nobody waits for another
    late = peer("b", place="step 8 (reading rows)", there=76.0)
    with pytest.raises(Ended):
        dog(Beats(waiting | {3: late})).look()
    said = capsys.readouterr().err
    assert "process 3 on b is in step 8 (reading rows) while others are in step 8 (forward and backward)" in said


def test_a_verdict_of_the_main_process_ends_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Ended):
        dog(Beats({0: peer("a")}, global_rank=9, verdict="process 1 is silent")).look()
    assert capsys.readouterr().err == ""


def test_a_failed_collective_is_explained_by_who_is_missing() -> None:
    peers = {0: peer("a"), 1: peer("b", silent=5.0)}
    assert dog(Beats(peers)).missing() == "process 1 on b, last heard of in step 7, has not answered"
    assert dog(None).missing() is None


def test_the_main_thread_may_end_the_process_instead() -> None:
    beats = Beats({0: peer("a"), 1: peer("b", silent=61.0)})
    watchdog = dog(beats)
    watchdog.take_over()
    watchdog.look()
    assert beats.told == []


def test_without_its_launcher_a_run_saves_and_ends(capsys: pytest.CaptureFixture[str]) -> None:
    orphan = Launcher((os.getpid(),))  # this process is not its own parent
    stop = StopRequest()
    dog(None, stop, orphan).look()
    assert stop.asked(is_main=False) and "has ended" in stop.why()
    with pytest.raises(Ended):
        dog(None, None, orphan).look()
    assert "the launcher has ended" in capsys.readouterr().err


CHILD = """
import sys, time
from salient_ds.run.launcher_alive import Launcher
launcher = Launcher.of_this_process()
print(len(launcher.pids), launcher.gone(), flush=True)
sys.stdin.readline()
deadline = time.monotonic() + 20
while launcher.pids and not launcher.gone() and time.monotonic() < deadline:
    time.sleep(0.05)
print(launcher.gone(), flush=True)
"""


@pytest.mark.parametrize(("name", "expected"), [("torchrun", 1), ("deepspeed", 1), ("my_script", 0)])
def test_only_launchers_are_waited_for(tmp_path: Path, name: str, expected: int) -> None:
    """A shell that ends, as with nohup, stops no training."""
    script = tmp_path / name
    script.write_text(
        "import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', sys.argv[1]])\ntime.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script), CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None and parent.stdout is not None
    assert parent.stdout.readline() == f"{expected} False\n"
    parent.kill()
    parent.wait()
    parent.stdin.write("\n")
    parent.stdin.flush()
    assert parent.stdout.readline() == f"{expected == 1}\n"
