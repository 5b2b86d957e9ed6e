"""The requests of a batch interface like OpenAI's, and the plans of batches on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .completion import NoCompletion, read_body
from .endpoint import Endpoint
from .refusals import GaveUp, HopelessError, refusal_in
from .transport import HttpTransport, Lost, NotConnected, Received, TooLarge

MOST_BYTES_OF_RESULTS = 1 << 30
PATH = "/v1/chat/completions"
PLAN = "salient_plan"
"""Name of the metadata entry by which a batch is found again."""


@dataclass
class Plan:
    """The calls of one batch: cache key -> name of the attempt in the ledger. ``batch`` is "" before it is known."""

    name: str
    calls: dict[str, str]
    batch: str = ""
    done: bool = False


class Plans:
    """An append-only file with all plans. It lies beside the reply cache, and is protected by the cache's lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._plans: dict[str, Plan] = {}
        for line in path.read_bytes().split(b"\n") if path.is_file() else ():
            try:
                row = json.loads(line)
                name = str(row["plan"])
                if "calls" in row:
                    self._plans[name] = Plan(name, {str(key): str(entry) for key, entry in row["calls"].items()})
                self._plans[name].batch = str(row.get("batch") or self._plans[name].batch)
                self._plans[name].done |= row.get("done") is True
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue  # a line that a kill left unfinished

    def open(self) -> list[Plan]:
        return [plan for plan in self._plans.values() if not plan.done]

    def write(self, plan: Plan, **row: Any) -> None:
        """Append a line about a plan. Returns when it is on disk."""
        self._plans[plan.name] = plan
        with open(self.path, "ab") as file:
            file.write(b"\n" + json.dumps({"plan": plan.name, **row}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def plans_path(cache: Path) -> Path:
    """Return the file of the plans that belongs to a reply cache."""
    return cache.with_suffix(".batches.jsonl")


@dataclass(frozen=True)
class BatchService:
    """Makes the requests, with retries. ``sleep`` waits between them (seconds)."""

    endpoint: Endpoint
    transport: HttpTransport
    sleep: Callable[[float], None]

    def order(self, plan: Plan, lines: bytes) -> str:
        """Upload the calls, order their batch, and return its id.

        Raises:
            HopelessError: the server refuses it; nothing was ordered.
            GaveUp: nobody knows whether it was ordered.
        """
        files = {"purpose": (None, "batch"), "file": ("calls.jsonl", lines, "application/jsonl")}
        uploaded = self.ask("POST", "/files", files=files)
        order = {"input_file_id": id_of(uploaded), "endpoint": PATH, "completion_window": "24h",
                 "metadata": {PLAN: plan.name}}  # fmt: skip
        return id_of(self.ask("POST", "/batches", order, once=True))

    def status(self, batch: str) -> dict[str, Any]:
        """Return what the server says of a batch."""
        return self.ask("GET", f"/batches/{batch}")

    def results(self, file: str) -> bytes:
        """Return the content of a result file."""
        return self._receive("GET", f"/files/{file}/content", most=MOST_BYTES_OF_RESULTS).data

    def find(self, plan: Plan) -> str:
        """Return the id of the batch that was ordered for a plan, or "" if there is none."""
        after = ""
        for _ in range(100):
            found = self.ask("GET", "/batches", query="limit=100" + (f"&after={after}" if after else ""))
            entries = [entry for entry in found.get("data") or [] if isinstance(entry, dict)]
            for entry in entries:
                if isinstance(entry.get("metadata"), dict) and entry["metadata"].get(PLAN) == plan.name:
                    return id_of(entry)
            after = str(entries[-1].get("id")) if entries else ""
            if found.get("has_more") is not True or not after:
                break
        return ""

    def ask(
        self, method: str, path: str, body: Any = None, files: Any = None, query: str = "", once: bool = False
    ) -> dict[str, Any]:
        received = self._receive(method, path, body, files=files, query=query, once=once)
        try:
            found = read_body(received.data)
        except NoCompletion:
            found = None
        if not isinstance(found, dict):
            raise GaveUp(f"{method} {path}: the reply is no JSON object. Run the same command to go on")
        return found

    def _receive(
        self, method: str, path: str, body: Any = None, *, files: Any = None, query: str = "", once: bool = False,
        most: int | None = None,
    ) -> Received:  # fmt: skip
        """Make one request of the interface. ``once``: a lost one may have worked, so it is not repeated.

        Raises:
            HopelessError: the server refuses it.
            GaveUp: no reply after all attempts.
        """
        url = self.endpoint.url(path) + (f"{'&' if '?' in self.endpoint.base_url else '?'}{query}" if query else "")
        reason = ""
        for attempt in range(1, self.endpoint.max_attempts + 1):
            try:
                received = self.transport.send(method, url, body, files, most)
            except TooLarge as error:
                raise HopelessError(f"{method} {path}: {error}") from None
            except NotConnected as error:
                reason = str(error)
            except Lost as error:
                reason = str(error)
                if once:
                    break
            else:
                if received.status == 200:
                    return received
                reason = self._refuse(method, path, received)
                if once and received.status >= 500:
                    break
            if attempt < self.endpoint.max_attempts:
                self.sleep(min(self.endpoint.max_wait_s, self.endpoint.backoff_s * 2 ** (attempt - 1)))
        raise GaveUp(f"{method} {path}: {reason}. Run the same command to go on")

    def _refuse(self, method: str, path: str, received: Received) -> str:
        """Return why to try again; raise HopelessError if that is in vain."""
        try:
            content = read_body(received.data)
        except NoCompletion:
            content = {"error": {"message": received.data[:2000].decode("utf-8", "replace")}}
        refusal = refusal_in(received.status, content)
        assert refusal is not None
        values = [value.removeprefix("Bearer ") for value in self.endpoint.secret_headers().values()]
        if received.status == 429 and refusal.code != "insufficient_quota" or received.status >= 500:
            return refusal.words(values)
        hint = ": this server has no batch interface; leave --batch out" if received.status in (404, 405) else ""
        raise HopelessError(f"{method} {path}: {refusal.words(values)}{hint}")


def id_of(found: dict[str, Any], name: str = "id") -> str:
    """Return a word of the reply that is part of an address.

    Raises:
        GaveUp: it is none.
    """
    value = found.get(name)
    if not isinstance(value, str) or not value or "/" in value or len(value) > 200:
        raise GaveUp(f"the batch interface sent no usable {name!r}. Run the same command to go on")
    return value
