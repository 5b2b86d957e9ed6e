"""Call a model behind an endpoint. Errors that may pass are retried, others stop the run.

Each client reads the API key from an environment variable and sends it in one header. The key appears in no file, log
line or error message.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Any

from .completion import NoCompletion, read_body, to_reply, usage_of
from .cost import Meter
from .endpoint import Endpoint as Endpoint
from .prompts import Messages
from .refusals import UNBILLED_STATUSES, Refusal, Retry, masked, refusal_in
from .refusals import CallFailed as CallFailed
from .refusals import GaveUp as GaveUp
from .refusals import HopelessError as HopelessError
from .transport import HttpTransport, Lost, NotConnected, Received, TooLarge, Transport
from .verdicts import Reply
from .waiting import asked_wait

PATIENCE_S = 3600.0
"""How long one call may wait for rate limits in all (seconds)."""
SHORTEST_WAIT_S = 0.05
Body = dict[str, Any]


class JudgeClient:
    """Thread-safe client. A wait that the server asks for holds for all threads: rate limits apply to the account."""

    def __init__(self, endpoint: Endpoint, sleep: Callable[[float], None] | None = None) -> None:
        self.endpoint = endpoint
        self.transport = _transport(endpoint)
        self._stop = threading.Event()
        self._sleep = sleep or self._stop.wait
        self._random = random.Random(0)
        self._lock = threading.Lock()
        self._not_before = 0.0
        if endpoint.clear_text and endpoint.key():
            logging.getLogger(__name__).warning(
                "the key in %s goes unencrypted to %s: use https, or a server on this machine",
                endpoint.api_key_env, endpoint.base_url,
            )  # fmt: skip

    def close(self) -> None:
        self.transport.close()

    def stop(self) -> None:
        """Wake threads that wait for another attempt. They give up. Calls in flight may end: they are paid for."""
        self._stop.set()

    def body(self, messages: Messages) -> Body:
        """Return the body of a chat request with the endpoint's parameters."""
        return {"model": self.endpoint.model, "messages": messages, **self.endpoint.parameters()}

    def chat(self, messages: Messages, meter: Meter | None = None) -> Reply:
        """Send a chat request with the endpoint's parameters and return the reply. Errors are those of :meth:`post`."""
        return self.post("/chat/completions", self.body(messages), meter)

    def post(self, path: str, body: Body, meter: Meter | None = None) -> Reply:
        """Send one request and return the reply. Failures that may pass are retried.

        Every attempt is booked on ``meter``. Attempts that a rate limit refused do not count as attempts.

        Raises:
            HopelessError: further calls would fail in the same way.
            CallFailed: this request fails, for example because it does not fit the context window.
            GaveUp: all attempts failed, the server asks for a longer wait than ``max_wait_s``, or the run was stopped.
            LimitReached: another attempt could pass the cost limit.
        """
        if self.endpoint.stream:
            body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        sent = failed = limits = 0
        waited, reason = 0.0, ""
        while failed < self.endpoint.max_attempts:
            self._wait_for_the_gate()
            if self._stop.is_set():
                raise GaveUp("not asked: the run was stopped" if not sent else f"{reason}; the run was stopped")
            if meter is not None:
                meter.begin()
                if self._stop.is_set():  # begin() may have waited
                    meter.nothing()
                    raise GaveUp("not asked: the run was stopped")
            sent += 1
            try:
                return self._attempt(path, body, sent, meter)
            except Retry as retry:
                reason = str(retry)
                limited = retry.limited
                limits += limited
                wait_s = retry_wait(retry, self.endpoint, limits)
            waited += wait_s or 0.0
            failed += not (limited and wait_s is not None and waited <= PATIENCE_S)
            if failed < self.endpoint.max_attempts:
                self._pause(max(1, failed), wait_s)
        raise GaveUp(f"{reason}; gave up after {sent} attempts")

    def _attempt(self, path: str, body: Body, sent: int, meter: Meter | None) -> Reply:
        """Make one attempt and book it. Raises Retry, or the errors of :meth:`post`."""
        booking = _Booking(meter)
        try:
            return self._exchange(path, body, sent, booking)
        finally:
            booking.settle()

    def _exchange(self, path: str, body: Body, sent: int, booking: _Booking) -> Reply:
        begin = time.monotonic()
        try:
            received = self.transport.send("POST", self.endpoint.url(path), body)
        except NotConnected as error:
            booking.nothing()
            raise Retry(str(error)) from None
        except Lost as error:
            raise Retry(str(error)) from None
        except TooLarge as error:
            raise CallFailed(str(error)) from None
        try:
            content = read_body(received.data, received.headers.get("content-type", ""))
        except NoCompletion as error:
            if received.status == 200:
                raise Retry(str(error)) from None
            content = {"error": {"message": received.data[:2000].decode("utf-8", "replace").strip()}}
        refusal = refusal_in(received.status, content)
        if refusal is not None:
            raise self._problem(refusal, received, content, body, booking)
        prompt, completion = usage_of(content)
        booking.used(prompt, completion)
        try:
            return to_reply(content, time.monotonic() - begin, sent)
        except NoCompletion as error:
            raise Retry(str(error)) from None

    def _problem(self, refusal: Refusal, received: Received, content: Any, sent: Body, booking: _Booking) -> Exception:
        usage = usage_of(content)
        if None not in usage:
            booking.used(*usage)
        elif refusal.status in UNBILLED_STATUSES:
            booking.nothing()
        secrets = self._secrets()
        error = refusal.to_error(self.endpoint, sent, secrets)
        if error is not None:
            return error
        wait_s = asked_wait(received.headers, content)
        return Retry(masked(refusal.words(secrets), secrets), wait_s, limited=refusal.status == 429)

    def _secrets(self) -> list[str]:
        try:
            values = self.endpoint.secret_headers().values()
        except ValueError:
            return []
        return [part for value in values for part in (value, value.removeprefix("Bearer "))]

    def _pause(self, attempt: int, wait_s: float | None) -> None:
        """Wait before the next attempt.

        If the server asked for a time, it applies to all threads. Otherwise this thread waits an exponential backoff,
        multiplied by a random factor from 0.5 to 1.
        """
        if wait_s is not None:
            with self._lock:
                self._not_before = max(self._not_before, time.monotonic() + wait_s)
            return
        with self._lock:
            share = self._random.uniform(0.5, 1.0)
        self._sleep(min(self.endpoint.max_wait_s, self.endpoint.backoff_s * 2 ** min(attempt - 1, 60)) * share)

    def _wait_for_the_gate(self) -> None:
        with self._lock:
            remaining = self._not_before - time.monotonic()
        if remaining > 0:
            self._sleep(remaining)


class _Booking:
    """Books one attempt exactly once: what it used, nothing, or (if nobody says) its ceiling."""

    def __init__(self, meter: Meter | None) -> None:
        self._meter = meter

    def used(self, prompt: int | None, completion: int | None) -> None:
        meter, self._meter = self._meter, None
        if meter is not None:
            meter.used(prompt, completion)

    def nothing(self) -> None:
        meter, self._meter = self._meter, None
        if meter is not None:
            meter.nothing()

    def settle(self) -> None:
        meter, self._meter = self._meter, None
        if meter is not None:
            meter.lost()


def retry_wait(retry: Retry, endpoint: Endpoint, limits: int) -> float | None:
    """Return the seconds to wait, if the server named a time; None for the usual backoff.

    A server may name too short a time again and again. After the fourth rate limit of one call (``limits``), the wait
    grows up to ten seconds.

    Raises:
        GaveUp: the server asks for a longer wait than ``max_wait_s``.
    """
    if retry.wait_s is None:
        return None
    if retry.wait_s > endpoint.max_wait_s:
        raise GaveUp(
            f"{retry}; the server asks to wait {retry.wait_s:.0f} s, more than max_wait_s={endpoint.max_wait_s:g}"
        )
    if not retry.limited:
        return retry.wait_s
    return max(retry.wait_s, SHORTEST_WAIT_S, min(10.0, endpoint.backoff_s * 2 ** min(limits - 5, 20)))


def _transport(endpoint: Endpoint) -> Transport:
    if endpoint.service == "litellm":
        from .litellm_service import LiteLLMTransport

        return LiteLLMTransport(endpoint)
    return HttpTransport(endpoint)
