"""What every attempt may have cost, on disk before it starts. So also a killed run is counted.

One line opens an attempt with the most tokens it can use, a second one closes it with what it used. An attempt without
its second line (the run was killed meanwhile) counts at the first. The file lies beside the reply cache, and is
protected by the cache's lock.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Tokens = tuple[int, int]
"""Prompt tokens and completion tokens."""


class Ledger:
    """An append-only file of attempts by call. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged_lines = 0
        self._calls: dict[str, dict[str, Tokens]] = {}
        self._call_of: dict[str, str] = {}
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")  # noqa: SIM115 - held for the life of the object
        self._read()

    def close(self) -> None:
        self._file.close()

    def __contains__(self, key: str) -> bool:
        return key in self._calls

    def spent_on(self, keys: Iterable[str]) -> Tokens:
        """Return the tokens of all attempts of these calls."""
        found = [tokens for key in set(keys) for tokens in self._calls.get(key, {}).values()]
        return sum(t[0] for t in found), sum(t[1] for t in found)

    def open(self, key: str, most: Tokens) -> str:
        """Write that an attempt starts and return its name. Returns when the line is on disk."""
        entry = uuid.uuid4().hex
        self._write({"call": key, "attempt": entry, "most": most}, sync=True)
        with self._lock:
            self._calls.setdefault(key, {})[entry] = most
            self._call_of[entry] = key
        return entry

    def close_entry(self, entry: str, used: Tokens) -> None:
        """Write what an attempt used."""
        self._write({"attempt": entry, "used": used}, sync=False)
        with self._lock:
            if entry in self._call_of:
                self._calls[self._call_of[entry]][entry] = used

    def _write(self, row: dict[str, Any], sync: bool) -> None:
        with self._lock:
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())

    def _read(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        for line in content.split(b"\n"):
            try:
                if not line.strip():
                    continue
                row = json.loads(line)
                entry = str(row["attempt"])
                if "call" in row:
                    self._call_of[entry] = str(row["call"])
                tokens = _tokens(row["most" if "call" in row else "used"])
                self._calls.setdefault(self._call_of[entry], {})[entry] = tokens
            except (ValueError, KeyError, TypeError, RecursionError):
                self.damaged_lines += 1
        if content and not content.endswith(b"\n"):
            self._file.write(b"\n")  # a torn line stays apart from the next one


def _tokens(value: Any) -> Tokens:
    prompt, completion = value
    if not (isinstance(prompt, int) and isinstance(completion, int) and prompt >= 0 and completion >= 0):
        raise ValueError(f"{value!r} are no token counts")
    return prompt, completion
