"""Cache of judge replies on disk: one fsynced JSON line per reply, found again by a hash of the request.

A second run never repeats an answered call, no matter how the first one was killed. The cache keeps the reply, not the
verdict, so that a better parser needs no new calls.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from .client import Endpoint
from .prompts import Messages
from .verdicts import Reply


def request_key(endpoint: Endpoint, messages: Messages, repeat: int = 0) -> str:
    """Hash everything that can change the reply: endpoint, model, messages, parameters and number of the repeat."""
    content = {**endpoint.identity(), "messages": messages, "repeat": repeat}
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class ReplyCache:
    """An append-only file with one writer. Only keys and file positions are held in memory, not the texts.

    An incomplete last line, left by a kill during a write, is cut off when the file is opened. Damaged lines elsewhere
    are skipped and counted.

    Raises:
        ValueError: another process has the file open.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged_lines = 0
        self.torn_bytes = 0
        self._places: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - held for the life of the object
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(
                f"{path} is being written by another judging run; wait for it, or give this one another --cache"
            ) from None
        self._index()

    def __enter__(self) -> ReplyCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def close(self) -> None:
        self._file.close()

    def get(self, key: str) -> tuple[Reply, float] | None:
        """Return the reply and the time at which it was stored (seconds since 1970), or None."""
        with self._lock:
            place = self._places.get(key)
            if place is None:
                return None
            line = os.pread(self._file.fileno(), place[1], place[0])
        row = json.loads(line)
        return Reply.from_dict(row["reply"]), float(row["tstamp"])

    def put(self, key: str, reply: Reply, about: dict[str, Any] | None = None) -> None:
        """Append one reply. Returns when it is on disk. A later line for the same key replaces an earlier one.

        ``about`` is stored for human readers of the file.
        """
        row = {"key": key, "tstamp": time.time(), "about": about or {}, "reply": reply.to_dict()}
        line = json.dumps(row, ensure_ascii=True).encode() + b"\n"
        with self._lock:
            start = self._file.seek(0, os.SEEK_END)
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._places[key] = (start, len(line))

    def _index(self) -> None:
        self._file.seek(0)
        start = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                self.torn_bytes = len(line)
                self._file.truncate(start)
                break
            try:
                key = _checked_key(json.loads(line))
                self._places[key] = (start, len(line))
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
                self.damaged_lines += 1
            start += len(line)


def _checked_key(row: Any) -> str:
    """Return the key of a row.

    Raises:
        ValueError, KeyError, TypeError: it is no row of this file.
    """
    reply = Reply.from_dict(row["reply"])
    counts = (reply.prompt_tokens, reply.completion_tokens)
    known = isinstance(reply.text, str | None) and all(isinstance(count, int | None) for count in counts)
    if not known or not isinstance(row["key"], str) or not isinstance(row["reply"], dict):
        raise TypeError("wrong types")
    float(row["tstamp"])
    return row["key"]
