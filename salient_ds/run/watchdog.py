"""Ends a process whose run cannot go on: others are silent, the main process said so, or the launcher is gone.

A process that waits in a collective for one that has stopped cannot help itself: it is in the middle of a call. So a
thread of every process watches. It reads the heartbeats, and whether the launcher lives.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

from salient_ds.run.exits import RUN_ERROR
from salient_ds.run.heartbeats import Heartbeats, Peer, open_store
from salient_ds.run.launcher_alive import Launcher
from salient_ds.run.stopping import StopRequest
from salient_ds.run.whereabouts import Whereabouts
from salient_ds.zero.collectives import world

GRACE = 15.0
"""Seconds that a collective has beyond its time limit to fail by itself."""
GO_ON = "--resume auto continues from the last checkpoint"


class Beats(Protocol):
    """What the watchdog needs of :class:`Heartbeats`."""

    global_rank: int
    interval: float
    peers: dict[int, Peer]
    verdict: str | None

    def condemn(self, message: str) -> None: ...

    def read_all(self) -> dict[int, Peer]: ...


def leave(status: int) -> None:
    """End this process at once, whatever its main thread does."""
    sys.stderr.flush()
    os._exit(status)


class Watchdog:
    """Watches for one process. :meth:`look` is one look; a thread calls it every second."""

    def __init__(
        self,
        beats: Beats | None,
        seconds: float,
        where: Whereabouts,
        stop: StopRequest | None = None,
        launcher: Launcher | None = None,
        end: Callable[[int], None] = leave,
    ) -> None:
        """
        Args:
            beats: heartbeats of the others; None: this process is alone.
            seconds: how long another process may be silent (``train.timeout_minutes``).
            stop: is asked to save and end if the launcher is gone; None: the process ends at once.
            launcher: the launcher that started this process, if it has one.
            end: ends the process with an exit status.
        """
        self.beats, self.seconds, self.where, self.stop = beats, seconds, where, stop
        self.launcher = launcher or Launcher.of_this_process()
        self._end, self._over, self._ending = end, threading.Event(), threading.Lock()

    def start(self) -> None:
        threading.Thread(target=self._work, name="watchdog", daemon=True).start()

    def close(self) -> None:
        """Watch no longer: this process ends by itself."""
        self._over.set()

    def take_over(self) -> None:
        """End this process from its main thread: the watchdog says nothing any more. If it is about to, wait for it."""
        self.close()
        if not self._ending.acquire(blocking=False):
            time.sleep(60)

    def _work(self) -> None:
        while not self._over.wait(min(1.0, self.seconds / 5)):
            self.look()

    def look(self) -> None:
        """End the process if its run cannot go on."""
        if self.launcher.gone():
            if self.stop is None:
                self._say("the launcher has ended, and this process with it")
                self._end(RUN_ERROR)
            else:
                self.stop.ask(f"the launcher, process {self.launcher.pids[0]}, has ended")
        if self.beats is None:
            return
        if self.beats.verdict is not None and self.beats.global_rank > 0:
            if os.environ.get("LOCAL_RANK") == "0" and self.beats.peers[0].host != socket.gethostname():
                self._say(self.beats.verdict)  # this node may have a log of its own
            self._end(RUN_ERROR)
            return
        problem = self._problem(self.beats.peers)
        if problem is None or not self._ending.acquire(blocking=False):
            return
        speaks = self.beats.global_rank <= 1 or os.environ.get("LOCAL_RANK") == "0"
        if speaks:  # one of them is enough, and the launcher ends a process that has not spoken yet
            self._say(f"{problem}. Process {self.beats.global_rank} is in {self.where}. {GO_ON}")
        if self.beats.global_rank == 0:
            self.beats.condemn(problem)
        elif not speaks:
            time.sleep(3)
        self._end(RUN_ERROR)

    def _problem(self, peers: dict[int, Peer]) -> str | None:
        """Why the run cannot go on: processes that are silent, or that others have been waiting for too long."""
        now = time.monotonic()
        others = {rank: peer for rank, peer in peers.items() if rank != self.beats_rank}
        silent = {rank: peer for rank, peer in others.items() if now - peer.heard >= self.seconds}
        if silent:
            return f"{describe(silent)} for {self.seconds / 60:g} minutes (train.timeout_minutes)"
        places = {peer.place for peer in peers.values()}
        if self.beats_rank == 0 and len(places) > 1:
            waited = min(now - peer.moved for peer in peers.values())
            if waited >= self.seconds + GRACE:
                first, last = (fewest(peers), most(peers))
                return f"{first} while others are in {last}, and nothing moved for {waited / 60:.3g} minutes"
        return None

    @property
    def beats_rank(self) -> int:
        return 0 if self.beats is None else self.beats.global_rank

    def missing(self) -> str | None:
        """Which processes have ended or do not answer now, after a collective has failed; None if all do.

        Takes a few seconds.
        """
        if self.beats is None:
            return None
        self.beats.read_all()
        time.sleep(2.5 * self.beats.interval + 0.5)
        late = time.monotonic() - 2.2 * self.beats.interval
        silent = {r: p for r, p in self.beats.peers.items() if p.heard < late and r != self.beats_rank}
        return describe(silent) if silent else None

    @staticmethod
    def _say(text: str) -> None:
        print(f"error: {text}", file=sys.stderr, flush=True)


def describe(silent: dict[int, Peer]) -> str:
    """The silent processes as the beginning of a sentence: numbers, hosts, and where the first of them was."""
    rank, first = next(iter(silent.items()))
    if len(silent) == 1:
        return f"process {rank} on {first.host}, last heard of in {first.place}, has not answered"
    hosts = list(dict.fromkeys(peer.host for peer in silent.values()))
    shown = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more" if len(hosts) > 8 else "")
    return f"{len(silent)} processes on {shown} have not answered (process {rank} was last heard of in {first.place})"


def _by_place(peers: dict[int, Peer]) -> list[tuple[str, list[int]]]:
    """Places and the processes there, the emptiest place first."""
    places: dict[str, list[int]] = {}
    for rank, peer in peers.items():
        places.setdefault(peer.place, []).append(rank)
    return sorted(places.items(), key=lambda item: len(item[1]))


def fewest(peers: dict[int, Peer]) -> str:
    """The processes in the emptiest place, as the beginning of a sentence."""
    place, ranks = _by_place(peers)[0]
    return f"process {ranks[0]} on {peers[ranks[0]].host} is in {place}"


def most(peers: dict[int, Peer]) -> str:
    """The place where most processes are."""
    return _by_place(peers)[-1][0]


def watch(timeout_minutes: float, where: Whereabouts, stop: StopRequest | None) -> Watchdog:
    """Start heartbeats and the watchdog of this process, which has joined its group."""
    seconds, beats = timeout_minutes * 60, None
    if world().world_size > 1:
        beats = Heartbeats(open_store(), lambda: str(where), interval=min(2.0, seconds / 10))
        beats.start()
    watchdog = Watchdog(beats, seconds, where, stop)
    watchdog.start()
    return watchdog
