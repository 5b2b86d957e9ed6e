"""One HTTP request with a deadline for all of it and a limit for its size.

A timeout of httpx starts again with every byte, so a server that drips would hold a call for ever. Here an event
loop in a thread of its own cancels the whole request at the deadline, also while the connection is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import zlib
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import httpx

from .endpoint import Endpoint

T = TypeVar("T")
MOST_BYTES = 16 << 20
"""Largest reply, unpacked. A verdict has some KB; a reply of 100 MB is an accident or an attack."""


@dataclass(frozen=True)
class Received:
    """What came back. ``headers`` have lower-case names."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    data: bytes = b""


class NotConnected(Exception):
    """The request never left this machine, so nothing was billed."""


class Lost(Exception):
    """The request was sent and no whole reply came: it may have been billed."""


class TooLarge(Exception):
    """The reply was larger than the limit."""


class Transport(Protocol):
    """Sends one request. Errors: NotConnected, Lost, TooLarge."""

    def send(self, method: str, url: str, body: Any = None) -> Received: ...

    def close(self) -> None: ...


class LoopThread:
    """An event loop in a thread of its own. Other threads hand it coroutines and wait for their results."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="http", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the coroutine's result, or raise its error."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def close(self) -> None:
        if self._thread.is_alive():
            self.run(_cancel_others())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(5.0)
            if not self._thread.is_alive():
                self._loop.close()


async def _cancel_others() -> None:
    """Cancel what libraries left running in this loop."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class HttpTransport:
    """Thread-safe."""

    def __init__(self, endpoint: Endpoint) -> None:
        headers = endpoint.secret_headers()
        self.timeout_s = endpoint.timeout_s
        self._loop = LoopThread()
        self._http = self._loop.run(_client(headers, endpoint))

    def send(
        self, method: str, url: str, body: Any = None, files: Any = None, most_bytes: int | None = None
    ) -> Received:
        """Send a JSON body, or files as a form, or nothing, and return the reply."""
        return self._loop.run(self._bounded(method, url, body, files, most_bytes or MOST_BYTES))

    def close(self) -> None:
        with contextlib.suppress(RuntimeError):  # closed before
            self._loop.run(self._http.aclose())
        self._loop.close()

    async def _bounded(self, method: str, url: str, body: Any, files: Any, most: int) -> Received:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await self._exchange(method, url, body, files, most)
        except TimeoutError:
            raise Lost(f"timeout (no whole reply after {self.timeout_s:g} s)") from None
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol) as error:
            raise NotConnected(f"connection problem ({type(error).__name__})") from None
        except httpx.TimeoutException as error:
            raise Lost(f"timeout ({type(error).__name__})") from None
        except (httpx.HTTPError, httpx.InvalidURL, zlib.error) as error:
            raise Lost(f"connection problem ({type(error).__name__})") from None

    async def _exchange(self, method: str, url: str, body: Any, files: Any, most: int) -> Received:
        sent = {"content": json.dumps(body).encode(), "headers": {"Content-Type": "application/json"}} if (
            body is not None) else {"files": files}  # fmt: skip
        async with self._http.stream(method, url, **sent) as response:
            unpack = _unpacker(response.headers.get("Content-Encoding", "identity"))
            data = bytearray()
            async for raw in response.aiter_raw():
                data += unpack(raw, most + 1 - len(data))
                if len(data) > most:
                    raise TooLarge(f"the reply is larger than {most >> 20} MiB")
        headers = {name.lower(): value for name, value in response.headers.items()}
        return Received(response.status_code, headers, bytes(data))


async def _client(headers: Mapping[str, str], endpoint: Endpoint) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        headers={**headers, "Accept-Encoding": "gzip"},
        trust_env=not endpoint.local,  # no proxy for a judge on this machine
        timeout=httpx.Timeout(endpoint.timeout_s, connect=min(15.0, endpoint.timeout_s)),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        follow_redirects=False,
    )


def _unpacker(encoding: str) -> Any:
    """Return a function (bytes, most bytes of the result) -> bytes. A bomb of gzip is never unpacked in full."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return lambda raw, most: raw
    if name not in ("gzip", "x-gzip", "deflate"):
        raise TooLarge(f"the reply is packed as {name[:20]!r}, which was not asked for")
    unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib, by its header
    return lambda raw, most: unpacker.decompress(raw, max(1, most))
