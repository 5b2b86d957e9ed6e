"""Heartbeats over a store: who hears what, and what happens when the store is gone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch.distributed as dist

from salient_ds.run import heartbeats
from salient_ds.run.heartbeats import Heartbeats
from salient_ds.zero.collectives import World

PROCESSES = 4


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Heartbeats]]:
    """Makes the heartbeats of one of four processes; all are stopped in the end."""
    made: list[Heartbeats] = []

    def one(rank: int, store: Any, place: str = "step 1") -> Heartbeats:
        monkeypatch.setattr(heartbeats, "world", lambda: World(rank, PROCESSES))
        made.append(Heartbeats(store, lambda: place, interval=0.02))
        made[-1].start()
        return made[-1]

    yield one
    for beats in made:
        beats.stop()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_main_process_hears_all_and_the_others_hear_it(make: Callable[..., Heartbeats]) -> None:
    store = dist.HashStore()
    all_beats = [make(rank, store, f"step {rank}") for rank in range(PROCESSES)]
    until(lambda: [peer.place for peer in all_beats[0].peers.values()] == ["step 0", "step 1", "step 2", "step 3"])
    assert list(all_beats[3].peers) == [0]
    until(lambda: all_beats[3].peers[0].place == "step 0")
    silent, other = all_beats[0].peers[2], all_beats[0].peers[1]
    all_beats[2].stop()
    time.sleep(0.1)
    heard = silent.heard
    until(lambda: other.heard > heard + 0.2)
    assert silent.heard == heard


def test_who_has_not_arrived_is_no_error(make: Callable[..., Heartbeats]) -> None:
    main = make(0, dist.HashStore())
    until(lambda: main.peers[0].beat >= "2")
    assert main.peers[3].beat == "" and main.peers[3].host == "an unknown host"


def test_a_verdict_reaches_all(make: Callable[..., Heartbeats]) -> None:
    store = dist.HashStore()
    main, other = make(0, store), make(2, store)
    until(lambda: other.peers[0].beat != "")
    main.condemn("process 1 on b is silent")
    until(lambda: other.verdict == "process 1 on b is silent")


def test_any_process_may_read_all_of_them(make: Callable[..., Heartbeats]) -> None:
    store = dist.HashStore()
    other = make(2, store)
    make(1, store, "loading the data")
    peers = other.read_all()
    until(lambda: peers[1].place == "loading the data")


def test_a_store_that_has_ended_leaves_the_main_process_silent(make: Callable[..., Heartbeats]) -> None:
    class Ended:
        def set(self, key: str, value: str) -> None:
            raise dist.DistNetworkError("Broken pipe")

    beats = make(1, Ended())
    began = beats.peers[0].heard
    beats._thread.join(10)
    assert not beats._thread.is_alive() and beats.peers[0].heard == began
