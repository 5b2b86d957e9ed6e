"""Heartbeats of all processes of a run, over the store in which they met.

Every process has a client of its own for that store, and a thread that writes there every few seconds where the process
is. The thread of the main process reads all of them; the others read the main process' only. So traffic grows with the
number of processes, not with its square.

The store itself lives in the main process (with torchrun, in the agent of its node). If that stops, calls of the store
do not return, whatever their time limit: nobody but this thread may make them.
"""

from __future__ import annotations

import datetime
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from salient_ds.zero.collectives import world

VERDICT = "verdict"


@dataclass
class Peer:
    """What this process knows of another one."""

    host: str = "an unknown host"
    place: str = "the start"
    beat: str = ""
    heard: float = field(default_factory=time.monotonic)
    """When a new beat arrived (time.monotonic)."""
    moved: float = field(default_factory=time.monotonic)
    """When it was first seen in its place."""

    def take(self, message: str) -> None:
        """Note what the process wrote last."""
        now = time.monotonic()
        beat, self.host, place = message.split("|", 2)
        if beat != self.beat:
            self.beat, self.heard = beat, now
        if place != self.place:
            self.place, self.moved = place, now


class Heartbeats:
    """Writes where this process is, and reads where others are, until it is stopped."""

    def __init__(self, store: Any, place: Callable[[], str], interval: float) -> None:
        """
        Args:
            store: a client of a key-value store that all processes share, for this object alone.
            place: where this process is, in a few words.
            interval: seconds between two beats.
        """
        self.global_rank, self.world_size = world()
        self.place, self.interval = place, interval
        self.peers = {rank: Peer() for rank in (range(self.world_size) if self.global_rank == 0 else [0])}
        """The others by number: all on the main process, the main process on others."""
        self.verdict: str | None = None
        """Why the run has to end, as the main process said."""
        self._store, self._lock, self._beats = store, threading.Lock(), 0
        self._done, self._wanted = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="heartbeats", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write no more beats. Does not wait for a call of the store that is under way."""
        self._done.set()
        self._wanted.set()

    def condemn(self, message: str) -> None:
        """Tell the other processes that the run has to end. The main process waits until it is written."""
        self.verdict = message
        self._wanted.set()
        time.sleep(min(2 * self.interval, 5.0) + 0.5)

    def read_all(self) -> dict[int, Peer]:
        """Read the beats of all processes, for the next few seconds, on any process."""
        self.peers = {rank: self.peers.get(rank, Peer()) for rank in range(self.world_size)}
        self._wanted.set()
        return self.peers

    def _work(self) -> None:
        while not self._done.is_set():
            try:
                self._exchange()
            except RuntimeError:  # the store has ended, and with it the main process
                return
            self._wanted.wait(self.interval)
            self._wanted.clear()

    def _exchange(self) -> None:
        self._beats += 1
        self._store.set(str(self.global_rank), f"{self._beats}|{socket.gethostname()}|{self.place()}")
        peers = dict(self.peers)
        if self.global_rank == 0 and self.verdict is not None:
            self._store.set(VERDICT, self.verdict)
        elif self.global_rank > 0 and self._store.check([VERDICT]):
            self.verdict = self._store.get(VERDICT).decode()
        new = [rank for rank, peer in peers.items() if not peer.beat]
        there = [rank for rank in peers if rank not in new] + [rank for rank in new if self._store.check([str(rank)])]
        messages = self._store.multi_get([str(rank) for rank in there]) if there else []
        for rank, message in zip(there, messages, strict=True):
            peers[rank].take(message.decode())


def open_store() -> Any:
    """A client for the store in which the processes met, with keys of this start of the run."""
    store = dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=60),
        wait_for_workers=False,
    )
    return PrefixStore(f"salient/beats/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
