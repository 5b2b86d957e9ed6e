"""A server on the loopback whose replies are given byte by byte, for what ScriptedJudge cannot do.

``respond(request)`` returns a :class:`Raw`. Everything that arrived is in ``requests``.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Request:
    """``number`` counts from 0. ``body`` is the parsed JSON, or the raw bytes if it is none."""

    number: int
    method: str
    path: str
    headers: dict[str, str]
    body: Any


@dataclass(frozen=True)
class Raw:
    """``data`` is sent as it is; ``promised`` more bytes are announced and never sent. ``drip_s``: pause per byte."""

    data: bytes | dict[str, Any] = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    promised: int = 0
    sleep_s: float = 0.0
    drip_s: float = 0.0
    close: bool = False


def completion(
    text: Any = "Rating: [[8]]", finish: Any = "stop", usage: Any = (100, 50), **more: Any
) -> dict[str, Any]:
    """A chat completion. ``usage`` is (prompt, completion) or anything else that a server may send."""
    counts = {"prompt_tokens": usage[0], "completion_tokens": usage[1]} if isinstance(usage, tuple) else usage
    return {
        "id": "x", "model": "judge-1", "usage": counts, **more,
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text}}],
    }  # fmt: skip


class RawServer:
    """Context manager; ``url`` is the base URL."""

    def __init__(self, respond: Callable[[Request], Raw | dict[str, Any]]) -> None:
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                outer.handle(self, respond)

            do_GET = do_POST

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> RawServer:
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def handle(self, handler: BaseHTTPRequestHandler, respond: Callable[[Request], Raw | dict[str, Any]]) -> None:
        raw = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        try:
            body = json.loads(raw)
        except ValueError:
            body = raw
        with self.lock:
            request = Request(len(self.requests), handler.command, handler.path, dict(handler.headers), body)
            self.requests.append(request)
        answer = respond(request)
        if isinstance(answer, dict):
            answer = Raw(answer)
        time.sleep(answer.sleep_s)
        try:
            self._send(handler, answer)
        except (BrokenPipeError, ConnectionResetError):
            handler.close_connection = True

    def _send(self, handler: BaseHTTPRequestHandler, answer: Raw) -> None:
        if answer.close:
            handler.close_connection = True
            handler.connection.close()
            return
        data = answer.data if isinstance(answer.data, bytes) else json.dumps(answer.data).encode()
        handler.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", **answer.headers}.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data) + answer.promised))
        handler.end_headers()
        if answer.drip_s:
            for place in range(len(data)):
                handler.wfile.write(data[place : place + 1])
                time.sleep(answer.drip_s)
        else:
            handler.wfile.write(data)
        if answer.promised:
            handler.close_connection = True
