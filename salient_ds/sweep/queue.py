"""A work queue made of files: any number of processes on any hosts that share the folder claim items, each item once.

An item is claimed by creating ``ITEM.0001``; the file system lets one process succeed. The owner refreshes the file's
time while it works. If it stops doing so for a lease, or if it is a process of this machine that is gone, another
process may create ``ITEM.0002``, and so on: the highest number owns the item. Nobody deletes or renames a claim, so
that two processes that see the same dead owner cannot take an item from each other. An owner that was only asleep
finds the higher number when it wakes, and gives up (:meth:`Claim.lost`).

Times are those of the file system, so that clocks of hosts may differ.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LEASE = 60.0
"""Seconds after which a claim that nobody refreshes is free again."""
BEATS = 6
"""Refreshes per lease."""


@dataclass
class Claim:
    """An item that this process owns."""

    item: str
    path: Path
    attempt: int
    """1, or more if the owners before this one died at work since the sweep was last started."""

    def refresh(self) -> None:
        """Tell others that this process is alive."""
        os.utime(self.path)

    def lost(self) -> bool:
        """Whether another process took the item over, because this one did not refresh it in time."""
        return newest(self.path.parent, self.item) != self.path

    def release(self) -> None:
        """Give the item back unfinished: anybody may claim it at once, and it does not count as an attempt."""
        os.utime(self.path, (0, 0))


class Queue:
    """Claims in one folder."""

    def __init__(self, folder: Path, lease: float = LEASE, session: str = "") -> None:
        """
        Args:
            lease: seconds.
            session: attempts are counted within one session.
        """
        self.folder, self.lease, self.session = folder, lease, session
        folder.mkdir(parents=True, exist_ok=True)

    def claim(self, item: str) -> Claim | None:
        """Claim an item; None if a live process owns it.

        Args:
            item: a file name without ``/``.
        """
        last = newest(self.folder, item)
        attempt = 1
        if last is not None:
            state = self._state(last)
            if state is None or state.alive:
                return None
            attempt += state.attempt if state.counts else 0
        number = 1 if last is None else int(last.suffix[1:]) + 1
        path = self.folder / f"{item}.{number:04d}"
        return Claim(item, path, attempt) if self._create(path, attempt) else None

    def _create(self, path: Path, attempt: int) -> bool:
        """Create the claim with its contents in one step. Hard links do so on network file systems too."""
        draft = self.folder / f".{secrets.token_hex(8)}"
        draft.write_text(json.dumps({"attempt": attempt, "session": self.session} | me()) + "\n")
        try:
            os.link(draft, path)
        except FileExistsError:
            return False
        finally:
            draft.unlink()
        return True

    def _state(self, path: Path) -> _State | None:
        """State of a claim; None if it vanished meanwhile."""
        try:
            touched, owner = path.stat().st_mtime, dict(json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None
        released = touched == 0
        dead = owner.get("machine") == me()["machine"] and not _runs(owner.get("pid"), owner.get("started"))
        alive = not released and not dead and self._now() - touched <= self.lease
        counts = not released and owner.get("session") == self.session
        return _State(alive, int(owner.get("attempt", 1)), counts)

    def owner_alive(self, item: str) -> bool:
        """Whether a live process owns the item."""
        last = newest(self.folder, item)
        state = None if last is None else self._state(last)
        return state is not None and state.alive

    def _now(self) -> float:
        """The file system's time."""
        probe = self.folder / f".{secrets.token_hex(8)}"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        return now


@dataclass(frozen=True)
class _State:
    alive: bool
    attempt: int
    counts: bool
    """The attempt belongs to this session, and ended without a release."""


def _claims(folder: Path, item: str) -> list[Path]:
    pattern = re.compile(re.escape(item) + r"\.\d{4,}")
    return sorted((p for p in folder.iterdir() if pattern.fullmatch(p.name)), key=lambda p: int(p.suffix[1:]))


def newest(folder: Path, item: str) -> Path | None:
    """The claim that counts; None if the item was never claimed."""
    found = _claims(folder, item)
    return found[-1] if found else None


_me: dict[int, dict[str, Any]] = {}


def me() -> dict[str, Any]:
    """How a claim names this process: machine (boot and PID namespace), pid, start time, host name."""
    pid = os.getpid()
    if pid not in _me:
        _me[pid] = {"machine": _machine(), "pid": pid, "started": _started(pid), "host": socket.gethostname()}
    return _me[pid]


def _machine() -> str:
    """Identifies the set of processes among which a pid is unique; never equal on two hosts."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return secrets.token_hex(8)  # not Linux: only the lease tells whether an owner lives


def _started(pid: int) -> str | None:
    """When a process of this machine started, in clock ticks after boot; None: there is no such process.

    A zombie counts as gone.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _runs(pid: Any, started: Any) -> bool:
    return isinstance(pid, int) and _started(pid) == started


class Heartbeat:
    """A thread that refreshes a claim while its owner works. Use it as a context manager."""

    def __init__(self, claim: Claim, lease: float = LEASE) -> None:
        self.claim, self.pause = claim, lease / BEATS
        self.lost = False
        """Whether another process has taken over. The owner looks at it between two steps."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def _beat(self) -> None:
        while not self._stop.wait(self.pause):
            try:
                self.lost = self.lost or self.claim.lost()
                if not self.lost:
                    self.claim.refresh()
            except OSError:  # the folder may be away for a moment
                continue

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
