"""Call a model behind any OpenAI-compatible endpoint. Errors that may pass are retried, others stop the run.

Each client reads the API key from an environment variable and sends it in one header. The key appears in no file, log
line or error message.
"""

from __future__ import annotations

import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal
from urllib.parse import urlsplit, urlunsplit

import httpx
from pydantic import BaseModel, ConfigDict, Field, field_validator

from .prompts import Messages
from .verdicts import Reply

HOPELESS_CODES = frozenset(
    {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "account_deactivated",
     "invalid_api_key", "model_not_found", "unsupported_parameter", "unsupported_value", "access_terminated"}
)  # fmt: skip
RETRIED_STATUSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 522, 524, 529})
Body = dict[str, Any]


class Endpoint(BaseModel):
    """Which judge to call, and how. Holds the name of the environment variable with the key, never the key itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: str = "gpt-4"
    base_url: str = "https://api.openai.com/v1"
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float | None = 0.0
    token_parameter: Literal["max_tokens", "max_completion_tokens", "none"] = "max_tokens"
    max_tokens: int = Field(default=2048, ge=1)
    seed: int | None = None
    merge_system: bool = False
    timeout_s: float = Field(default=120.0, gt=0)
    max_attempts: int = Field(default=8, ge=1)
    backoff_s: float = Field(default=1.0, ge=0)
    max_wait_s: float = Field(default=120.0, ge=0)

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url={value!r} must look like https://host/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("base_url must hold no credentials and no query: it is written into the records")
        return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", ""))

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that are sent along with model and messages. They are part of the cache key."""
        body: dict[str, Any] = {}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.token_parameter != "none":
            body[self.token_parameter] = self.max_tokens
        if self.seed is not None:
            body["seed"] = self.seed
        return body


class HopelessError(RuntimeError):
    """Every further call would fail in the same way (key, quota, model name, parameter), so the run has to stop."""


class CallFailed(RuntimeError):
    """This call got no usable reply, but others may. The message is short and holds no text of the request."""


class GaveUp(CallFailed):
    """No reply after all attempts, or the run was stopped. The same call may succeed later."""


class _Retry(Exception):
    """One attempt failed in a way that may pass. ``wait_s`` is the waiting time that the server asked for, if any."""

    def __init__(self, reason: str, wait_s: float | None = None) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class JudgeClient:
    """Thread-safe client. A Retry-After header makes all threads wait, because rate limits apply to the account."""

    def __init__(self, endpoint: Endpoint, sleep: Callable[[float], None] | None = None) -> None:
        self.endpoint = endpoint
        local = urlsplit(endpoint.base_url).hostname in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.Client(
            headers=_authorization(endpoint, optional=local),
            trust_env=not local,  # no proxy for a judge on this machine
            timeout=httpx.Timeout(endpoint.timeout_s, connect=min(15.0, endpoint.timeout_s)),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )
        self._stop = threading.Event()
        self._sleep = sleep or self._stop.wait
        self._random = random.Random(0)
        self._lock = threading.Lock()
        self._not_before = 0.0

    def close(self) -> None:
        self._http.close()

    def stop(self) -> None:
        """Wake threads that wait for another attempt. They give up."""
        self._stop.set()

    def chat(self, messages: Messages) -> Reply:
        """Send a chat request with the endpoint's parameters and return the reply. Errors are those of :meth:`post`."""
        body = {"model": self.endpoint.model, "messages": messages, **self.endpoint.parameters()}
        return self.post("/chat/completions", body)

    def post(self, path: str, body: Body) -> Reply:
        """Send one request and return the reply. Failures that may pass are retried.

        Raises:
            HopelessError: further calls would fail in the same way.
            CallFailed: this request fails, for example because it does not fit the context window.
            GaveUp: all attempts failed, the server asks for a longer wait than ``max_wait_s``, or the run was stopped.
        """
        reason = ""
        for attempt in range(1, self.endpoint.max_attempts + 1):
            self._wait_for_the_gate()
            if self._stop.is_set():
                raise GaveUp("not asked: the run was stopped")
            try:
                return self._attempt(path, body, attempt)
            except _Retry as retry:
                reason = str(retry)
                if retry.wait_s is not None and retry.wait_s > self.endpoint.max_wait_s:
                    raise GaveUp(
                        f"{reason}; the server asks to wait {retry.wait_s:.0f} s, more than max_wait_s="
                        f"{self.endpoint.max_wait_s:g}"
                    ) from None
                if attempt < self.endpoint.max_attempts:
                    self._pause(attempt, retry.wait_s)
        raise GaveUp(f"{reason}; gave up after {self.endpoint.max_attempts} attempts")

    def _attempt(self, path: str, body: Body, attempt: int) -> Reply:
        begin = time.monotonic()
        try:
            response = self._http.post(f"{self.endpoint.base_url}{path}", json=body)
        except httpx.TimeoutException as error:
            raise _Retry(f"timeout ({type(error).__name__})") from None
        except httpx.TransportError as error:
            raise _Retry(f"connection problem ({type(error).__name__})") from None
        if response.status_code != 200:
            raise self._problem(response, body)
        return _reply_from(response, time.monotonic() - begin, attempt)

    def _problem(self, response: httpx.Response, sent: Body) -> Exception:
        code, message = _error_of(response)
        # A server may quote the key in its message, so the message is not passed on.
        text = f"HTTP {response.status_code}" + (f" {code}" if code else "")
        if response.status_code in (401, 403) or code in HOPELESS_CODES:
            return HopelessError(f"{text} from {self.endpoint.base_url}: {_remedy(code, self.endpoint)}")
        if response.status_code == 404:
            return HopelessError(f"{text}: {response.url} does not exist, or has no model {self.endpoint.model!r}")
        if response.status_code == 400 and _names_a_parameter(message, sent):
            return HopelessError(
                f"{text} from {self.endpoint.base_url}: {_remedy('unsupported_parameter', self.endpoint)}"
            )
        if response.status_code in RETRIED_STATUSES or response.status_code >= 500:
            return _Retry(text, _retry_after(response))
        if "context" in (code + message).lower():
            return CallFailed(f"{text}: prompt does not fit the context window")
        return CallFailed(text)

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
        self._sleep(min(self.endpoint.max_wait_s, self.endpoint.backoff_s * 2 ** (attempt - 1)) * share)

    def _wait_for_the_gate(self) -> None:
        with self._lock:
            remaining = self._not_before - time.monotonic()
        if remaining > 0:
            self._sleep(remaining)


def _authorization(endpoint: Endpoint, optional: bool) -> dict[str, str]:
    """Return the header with the key. A separate function, so that no long-lived frame has the key among its locals."""
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key and not optional:
        raise ValueError(
            f"environment variable {endpoint.api_key_env} is empty and {endpoint.base_url} is not on this machine: "
            "export the key, or name another variable with --api-key-env"
        )
    return {"Authorization": f"Bearer {key}"} if key else {}


def _reply_from(response: httpx.Response, latency_s: float, attempt: int) -> Reply:
    try:
        body = response.json()
        choice = body["choices"][0]
        text = choice["message"].get("content") if "message" in choice else choice["text"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError):
        raise _Retry("reply is cut or is no completion") from None
    usage = body.get("usage") or {}
    return Reply(
        text=text if isinstance(text, str) else None,
        model=str(body.get("model") or ""),
        finish_reason=str(choice.get("finish_reason") or ""),
        system_fingerprint=str(body.get("system_fingerprint") or ""),
        prompt_tokens=usage.get("prompt_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        latency_s=round(latency_s, 3),
        attempts=attempt,
    )


def _names_a_parameter(message: str, sent: Body) -> bool:
    """Whether the message of a 400 rejects a parameter that is sent with every call."""
    lowered = message.lower()
    return any(name in lowered for name in set(sent) - {"model", "messages", "prompt"}) and (
        "unsupported" in lowered or "not supported" in lowered or "unrecognized" in lowered
    )


def _error_of(response: httpx.Response) -> tuple[str, str]:
    """Return code and message of an error body; empty strings if the body has another form."""
    try:
        error = response.json().get("error") or {}
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError):
        return "", ""
    if not isinstance(error, dict):
        return "", str(error)
    codes = [str(error[name]) for name in ("code", "type") if error.get(name)]
    known = [code for code in codes if code in HOPELESS_CODES or code == "context_length_exceeded"]
    code = (known or codes or [""])[0]
    return (code if code.replace("_", "").isalnum() and len(code) < 60 else ""), str(error.get("message") or "")


def _retry_after(response: httpx.Response) -> float | None:
    """Return the seconds that Retry-After asks for (a number, or a date as in RFC 9110), or None."""
    value = response.headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _remedy(code: str, endpoint: Endpoint) -> str:
    if code in ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active"):
        return "the account's quota is used up; waiting does not help"
    if code == "model_not_found":
        return f"no model {endpoint.model!r} there; name another"
    if code in ("unsupported_parameter", "unsupported_value"):
        return (
            f"it refuses one of {sorted(endpoint.parameters())}; try --token-parameter max_completion_tokens, "
            "or --temperature none"
        )
    return f"the key in {endpoint.api_key_env} is missing, wrong, or not allowed to use this model"
