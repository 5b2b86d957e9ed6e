"""Which server to call and with what: address, key, headers, parameters. Nothing here holds a key.

A header may name an environment variable (``X-Token: env:MY_TOKEN``). Its value is read when the client starts, and is
written nowhere.
"""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any, Literal
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
FROM_ENVIRONMENT = "env:"
OWN_OPTIONS = {
    "model": "--judge-model", "messages": "the questions", "prompt": "the questions", "stream": "--stream",
    "stream_options": "--stream", "temperature": "--temperature", "top_p": "--top-p", "seed": "--seed",
    "max_tokens": "--max-tokens", "max_completion_tokens": "--token-parameter max_completion_tokens",
    "n": "--repeats", "best_of": "--repeats",
}  # fmt: skip
"""Keys that ``extra_body`` must not have, and the option that sets each. ``n`` would also multiply the bill."""
VENDOR_KEYS = {
    "anthropic": "ANTHROPIC_API_KEY", "gemini": "GEMINI_API_KEY", "mistral": "MISTRAL_API_KEY",
    "deepseek": "DEEPSEEK_API_KEY", "groq": "GROQ_API_KEY", "cohere": "COHERE_API_KEY", "xai": "XAI_API_KEY",
}  # fmt: skip
"""Usual variable of the key for models that litellm calls, by the part of the model's name before the slash."""
_SECRET_WORDS = re.compile(r"key|token|secret|passw|sig|auth|credential|code", re.IGNORECASE)
_SECRET_HEADERS = re.compile(r"key|token|secret|passw|auth|cookie", re.IGNORECASE)
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


class Endpoint(BaseModel):
    """Which judge to call, and how. Holds the name of the environment variable with the key, never the key itself.

    ``timeout_s`` bounds one attempt from the first byte sent to the last byte read (seconds). ``reply_ceiling`` is the
    most completion tokens that one reply can have; without it that is ``max_tokens``, if these are sent.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    model: str = "gpt-4"
    base_url: str = "https://api.openai.com/v1"
    service: Literal["openai", "litellm"] = "openai"
    api_key_env: str = "OPENAI_API_KEY"
    api_key_header: str | None = None
    headers: dict[str, str] = Field(default_factory=dict)
    temperature: float | None = 0.0
    top_p: float | None = Field(default=None, gt=0, le=1)
    token_parameter: Literal["max_tokens", "max_completion_tokens", "none"] = "max_tokens"
    max_tokens: int = Field(default=2048, ge=1)
    reply_ceiling: int | None = Field(default=None, ge=1)
    seed: int | None = None
    reasoning_effort: str | None = None
    extra_body: dict[str, Any] = Field(default_factory=dict)
    stream: bool = False
    merge_system: bool = False
    timeout_s: float = Field(default=120.0, gt=0)
    max_attempts: int = Field(default=8, ge=1)
    backoff_s: float = Field(default=1.0, ge=0)
    max_wait_s: float = Field(default=120.0, ge=0)

    @field_validator("base_url")
    @classmethod
    def _plain_url(cls, value: str) -> str:
        if not value:  # the vendors' own address; the service "litellm" knows it
            return value
        parts = urlsplit(value)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"base_url={value!r} must look like https://host/v1")
        query = parse_qsl(parts.query, keep_blank_values=True)
        if parts.username or parts.password or any(_SECRET_WORDS.search(name) for name, _ in query):
            raise ValueError(
                "base_url must hold no credentials: it is written into the records. A query such as "
                "?api-version=2024-10-21 is fine; put a key into the variable that --api-key-env names"
            )
        path = re.sub(r"/(chat/)?completions/?$", "", parts.path).rstrip("/")
        return urlunsplit((parts.scheme, parts.netloc, path, urlencode(query), ""))

    @field_validator("headers")
    @classmethod
    def _plain_headers(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if not _HEADER_NAME.fullmatch(name) or any(ord(letter) < 32 or ord(letter) > 126 for letter in value):
                raise ValueError(f"header {name!r} must be a name and a value of printable ASCII characters")
            if _SECRET_HEADERS.search(name) and not value.startswith(FROM_ENVIRONMENT):
                raise ValueError(
                    f"header {name!r} looks like a secret: put its value into an environment variable, and give "
                    f"--header '{name}: env:VARIABLE'"
                )
        return headers

    @field_validator("extra_body")
    @classmethod
    def _no_own_option(cls, body: dict[str, Any]) -> dict[str, Any]:
        for name in body:
            if name in OWN_OPTIONS:
                raise ValueError(f"--extra-body must not set {name!r}: {OWN_OPTIONS[name]} does that")
        return body

    @model_validator(mode="after")
    def _fits_together(self) -> Endpoint:
        if not self.base_url and self.service == "openai":
            raise ValueError("base_url='' must look like https://host/v1")
        if self.reasoning_effort is not None and "reasoning_effort" in self.extra_body:
            raise ValueError("--reasoning-effort and --extra-body both set reasoning_effort: give one of them")
        return self

    def url(self, path: str) -> str:
        """Return the address of ``path`` below the base address, with the base's query."""
        parts = urlsplit(self.base_url)
        return urlunsplit((parts.scheme, parts.netloc, parts.path + path, parts.query, ""))

    @property
    def local(self) -> bool:
        """Whether the server runs on this machine."""
        return urlsplit(self.base_url).hostname in LOCAL_HOSTS

    @property
    def clear_text(self) -> bool:
        """Whether a key would travel unencrypted to another machine."""
        return self.base_url.startswith("http://") and not self.local

    @property
    def most_completion_tokens(self) -> int | None:
        """Return the most completion tokens that one reply can have, or None if nothing bounds them."""
        return self.reply_ceiling or (self.max_tokens if self.token_parameter != "none" else None)

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that are sent along with model and messages. They are part of the cache key."""
        body: dict[str, Any] = {}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.top_p is not None:
            body["top_p"] = self.top_p
        if self.token_parameter != "none":
            body[self.token_parameter] = self.max_tokens
        if self.seed is not None:
            body["seed"] = self.seed
        if self.reasoning_effort is not None:
            body["reasoning_effort"] = self.reasoning_effort
        return body | self.extra_body

    def identity(self) -> dict[str, Any]:
        """Return everything about the server that can change a reply. It is part of the cache key."""
        found: dict[str, Any] = {"base_url": self.base_url, "model": self.model, "parameters": self.parameters()}
        if self.headers:
            found["headers"] = self.headers
        if self.service != "openai":
            found["service"] = self.service
        return found

    def key(self) -> str:
        """Return the API key, or "" if there is none and the server is on this machine.

        Raises:
            ValueError: the server is elsewhere and the variable is empty.
        """
        found = os.environ.get(self.api_key_env, "").strip()
        if not found and not self.local:
            where = self.base_url or f"the service of {self.model}"
            raise ValueError(
                f"environment variable {self.api_key_env} is empty and {where} is not on this machine: "
                "export the key, or name another variable with --api-key-env"
            )
        return found

    def secret_headers(self) -> dict[str, str]:
        """Return all headers with their real values, among them the key's. Callers must not keep or print them.

        Azure wants its key in ``api-key``; a query with ``api-version`` marks its servers.
        """
        sent = {}
        for name, value in self.headers.items():
            if value.startswith(FROM_ENVIRONMENT):
                variable = value.removeprefix(FROM_ENVIRONMENT)
                value = os.environ.get(variable, "").strip()
                if not value:
                    raise ValueError(f"environment variable {variable}, which header {name!r} names, is empty")
            sent[name] = value
        key = self.key()
        name = self.api_key_header or ("api-key" if "api-version=" in self.base_url else "Authorization")
        if key and name.lower() not in {other.lower() for other in sent}:
            sent[name] = f"Bearer {key}" if name.lower() == "authorization" else key
        return sent


def parse_header(text: str) -> tuple[str, str]:
    """Parse the value of --header, ``Name: value``.

    Raises:
        ValueError: there is no colon, or no name before it.
    """
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise ValueError(f"--header {text!r} must look like 'Name: value'")
    return name.strip(), value.strip()


def parse_extra_body(text: str | None) -> dict[str, Any]:
    """Parse the value of --extra-body, a JSON object.

    Raises:
        ValueError: it is not a JSON object, or holds NaN or an infinite number.
    """
    if text is None:
        return {}
    try:
        found = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--extra-body {text[:80]!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--extra-body {text[:80]!r} must be a JSON object such as '{{\"top_k\": 1}}'")
    return found


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is too large for a number")
    return value
