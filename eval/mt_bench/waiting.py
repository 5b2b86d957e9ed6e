"""How long a server asks to wait: headers and messages of rate limits."""

from __future__ import annotations

import email.utils
import math
import re
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+(?:\.\d+)?)ms)?")
_TRY_AGAIN = re.compile(
    r"(?:try again in|retry (?:in|after)|wait)\s*(?:for\s*)?((?:\d+(?:\.\d+)?(?:ms|h|m|s)\s*)+|\d+(?:\.\d+)?)"
    r"\s*(milliseconds?|seconds?|secs?|minutes?|mins?|hours?)?",
    re.IGNORECASE,
)


def asked_wait(headers: Mapping[str, str], body: Any = None) -> float | None:
    """Return the seconds that a refusal asks to wait, or None if it does not say.

    In this order: ``retry-after-ms``, ``Retry-After``, the reset time of the limit that is used up (OpenAI's, Azure's
    and OpenRouter's headers), "try again in 6.2s" in the message. Gateways repeat the headers in the body.
    """
    inner = _inner_headers(body)
    for found in (headers, inner):
        for wait in (_milliseconds(found.get("retry-after-ms")), _retry_after(found.get("retry-after"))):
            if wait is not None:
                return wait
    for found in (headers, inner):
        waits = [_until(found[name]) for name in found if _is_used_up(name, found)]
        known = [wait for wait in waits if wait is not None]
        if known:
            return max(known)
    return _from_message(_message(body))


def _is_used_up(name: str, headers: Mapping[str, str]) -> bool:
    """Whether ``name`` is the reset time of a limit of which nothing is left (or nothing is said)."""
    if not re.fullmatch(r"x-ratelimit-reset(-[a-z-]+)?", name):
        return False
    left = headers.get(name.replace("reset", "remaining"), "0")
    return _number(left) in (0.0, None)


def _inner_headers(body: Any) -> dict[str, str]:
    found = body
    for name in ("error", "metadata", "headers"):
        found = found.get(name) if isinstance(found, dict) else None
    return {str(k).lower(): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return message[:2000] if isinstance(message, str) else ""


def _from_message(message: str) -> float | None:
    match = _TRY_AGAIN.search(message)
    if match is None:
        return None
    amount, unit = match.group(1).replace(" ", ""), (match.group(2) or "").lower()
    value = _number(amount)
    if value is None:
        return _duration(amount)
    scale = {"mi": 1e-3 if unit.startswith("milli") else 60.0, "ho": 3600.0}.get(unit[:2], 1.0)
    return value * scale


def _milliseconds(value: str | None) -> float | None:
    number = _number(value)
    return None if number is None else max(0.0, number / 1e3)


def _retry_after(value: str | None) -> float | None:
    """Return the seconds of Retry-After (a number, or a date as in RFC 9110), or None."""
    if not value or not value.strip():
        return None
    number = _number(value)
    if number is not None:
        return max(0.0, number)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())


def _until(value: str) -> float | None:
    """Return the seconds until a reset: "6m0s", "120ms", seconds, or a time since 1970 in seconds or milliseconds."""
    number = _number(value)
    if number is None:
        return _duration(value)
    if number > 1e11:
        return max(0.0, number / 1e3 - time.time())
    return max(0.0, number - time.time()) if number > 1e9 else max(0.0, number)


def _duration(value: str) -> float | None:
    match = _DURATION.fullmatch(value.strip()[:40])
    if match is None or not any(match.groups()):
        return None
    hours, minutes, seconds, milliseconds = (float(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1e3


def _number(value: str | None) -> float | None:
    try:
        number = float(value) if value is not None else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None
