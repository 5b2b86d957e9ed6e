"""Heartbeats over a store: who hears what, and what happens when the store is gone."""

from __future__ import annotations

import time
from collections import Counter
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


class CountingStore:
    """A store of one machine that counts the calls and the keys of each process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.calls: Counter[str] = Counter()
        self.keys = 0

    def set(self, key: str, value: str) -> None:
        self.calls["set"] += 1
        self.values[key] = value.encode()

    def get(self, key: str) -> bytes:
        self.calls["get"] += 1
        return self.values[key]

    def check(self, keys: list[str]) -> bool:
        self.calls["check"] += 1
        return all(key in self.values for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.calls["multi_get"] += 1
        self.keys += len(keys)
        return [self.values[key] for key in keys]


def test_4096_processes_take_a_few_calls_each_and_one_read_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    processes, store = 4096, CountingStore()
    everyone = []
    for rank in range(processes):
        monkeypatch.setattr(heartbeats, "world", lambda rank=rank: World(rank, processes))
        everyone.append(Heartbeats(store, lambda: "step 1000, reducing gradients and stepping", interval=2.0))
    for _ in range(2):  # who has not been heard of is looked for first
        for beats in reversed(everyone):
            beats._exchange()
    assert all(peer.beat == "2" for peer in everyone[0].peers.values())
    others, store.calls, store.keys = processes - 1, Counter(), 0
    for beats in everyone[1:]:
        beats._exchange()
    assert store.calls == {"set": others, "check": others, "multi_get": others} and store.keys == others
    store.calls, store.keys = Counter(), 0
    everyone[0]._exchange()
    assert store.calls == {"set": 1, "multi_get": 1} and store.keys == processes
    assert sum(map(len, store.values.values())) < 2**20, "what the main process reads every two seconds"
