"""A judge without a model: an HTTP server on the loopback whose replies and faults follow a script.

``faults`` maps the number of a request (0-based, over the whole run) to a fault; ``fault_for`` decides by content.
Run as a program it serves until it is killed, and prints its port.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


def rate_by_hash(body: Body) -> str:
    """A rating 1..10, or a letter, that depends on nothing but the messages."""
    digest = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()
    if "[[A]]" in body["messages"][0]["content"]:
        return f"Compared. Final verdict: [[{'ABC'[digest[0] % 3]}]]"
    return f"Looked at it. Rating: [[{digest[0] % 10 + 1}]]"


class ScriptedJudge:
    """Context manager; ``url`` is the base URL, ``requests`` counts bodies, ``peak`` is the most seen at once."""

    def __init__(self, reply: Callable[[Body], str | None] = rate_by_hash, port: int = 0) -> None:
        self.reply = reply
        self.faults: dict[int, str] = {}
        self.fault_for: Callable[[Body, int], str | None] = lambda body, seen: None
        self.delay_s = 0.0
        self.requests: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[Body] = []
        self.headers: list[dict[str, str]] = []
        self.keep_bodies = True
        self.total = self.now = self.peak = 0
        self.lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else every reply waits 40 ms for an acknowledgement of its headers

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                judge.handle(self)

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 256

        self.server = Server(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def __enter__(self) -> ScriptedJudge:
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        body = json.loads(raw)
        key = hashlib.sha256(raw).hexdigest()
        with self.lock:
            number, seen = self.total, self.requests[key]
            self.total += 1
            self.requests[key] += 1
            if self.keep_bodies:
                self.bodies.append(body)
                self.headers.append(dict(handler.headers))
            self.now += 1
            self.peak = max(self.peak, self.now)
        try:
            if self.delay_s:
                time.sleep(self.delay_s)
            self._answer(handler, body, key, self.faults.get(number) or self.fault_for(body, seen))
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with self.lock:
                self.now -= 1

    def _answer(self, handler: BaseHTTPRequestHandler, body: Body, key: str, fault: str | None) -> None:
        statuses = {"429": 429, "429-after": 429, "429-date": 429, "429-long": 429, "quota": 429, "500": 500,
                    "503": 503, "401": 401, "404": 404, "context": 400, "400": 400, "parameter": 400}  # fmt: skip
        if fault == "close":
            handler.close_connection = True
            handler.connection.close()
            return
        if fault == "timeout":
            time.sleep(1.2)
            fault = None
        if fault in statuses:
            self._send(handler, statuses[fault], json.dumps(_error(fault)).encode(), fault)
            return
        text = None if fault == "null" else "I would rather not say." if fault == "garble" else self.reply(body)
        finish = {"null": "content_filter", "garble": "length"}.get(fault or "", "stop")
        data = json.dumps(_completion(body, text, finish)).encode()
        if fault == "html":
            data = b"<html><body>Bad gateway</body></html>"
        if fault == "cut":
            data = data[: len(data) // 2]
        if fault is None or fault in ("null", "garble"):
            with self.lock:
                self.answered[key] += 1
        self._send(handler, 200, data, fault)

    def _send(self, handler: BaseHTTPRequestHandler, status: int, data: bytes, fault: str | None) -> None:
        handler.send_response(status)
        after = {"429-after": "0.05", "429-date": "Sun, 06 Nov 1994 08:49:37 GMT", "429-long": "3600"}.get(fault or "")
        if after:
            handler.send_header("Retry-After", after)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(data) + (10 if fault == "short" else 0)))
        handler.end_headers()
        handler.wfile.write(data)
        if fault == "short":
            handler.close_connection = True


def _error(fault: str) -> Body:
    codes = {"quota": "insufficient_quota", "401": "invalid_api_key", "404": "model_not_found",
             "context": "context_length_exceeded", "parameter": "unsupported_parameter"}  # fmt: skip
    message = "Incorrect API key provided: sk-secret-value" if fault == "401" else f"scripted {fault}"
    if fault == "parameter":
        message = "Unsupported parameter: 'max_tokens' is not supported with this model."
    return {"error": {"message": message, "type": "scripted", "code": codes.get(fault)}}


def _completion(body: Body, text: str | None, finish: str) -> Body:
    message = {"text": text} if "prompt" in body else {"message": {"role": "assistant", "content": text}}
    size = len(body.get("prompt", "")) + sum(len(m["content"]) for m in body.get("messages", ()))
    return {
        "id": "c", "object": "chat.completion", "model": f"{body['model']}-0613", "system_fingerprint": "fp_1",
        "choices": [{"index": 0, **message, "finish_reason": finish}],
        "usage": {"prompt_tokens": size // 4, "completion_tokens": len(text or "") // 4, "total_tokens": 0},
    }  # fmt: skip


if __name__ == "__main__":
    with ScriptedJudge() as server:
        server.delay_s = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0
        print(server.url, flush=True)
        threading.Event().wait()
