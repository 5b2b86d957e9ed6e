"""Why a call got no reply: what the server said, whether others would fail too, and what to do about it.

The server's own words are shown, because they often are the remedy ("please enable the stream parameter"). They are cut
to one line, and everything that looks like a key is masked: servers quote keys.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .endpoint import Endpoint

MOST_CHARACTERS = 300
FEW, MANY = 3, 10
"""Equal refusals in a row that stop a run: before the first reply, and after it."""
QUOTA_CODES = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
HOPELESS_CODES = QUOTA_CODES | frozenset(
    {"account_deactivated", "invalid_api_key", "model_not_found", "unsupported_parameter", "unsupported_value",
     "access_terminated"}
)  # fmt: skip
RETRIED_STATUSES = frozenset({408, 409, 425, 429, 498, 499})
UNBILLED_STATUSES = frozenset(range(300, 500)) - {408, 409, 498, 499}
"""The server refused before it did any work. After other errors a reply may exist, and be billed, without arriving."""

_STATUS_OF_CODE = {
    "invalid_request_error": 400, "BadRequestError": 400, "context_length_exceeded": 400, "authentication_error": 401,
    "invalid_api_key": 401, "insufficient_quota": 402, "permission_error": 403, "not_found_error": 404,
    "model_not_found": 404, "rate_limit_error": 429, "rate_limit_exceeded": 429,
}  # fmt: skip
"""For errors with status 200 that name no number."""

_KEY_LIKE = re.compile(r"\b(?:sk|pk|rk|gsk|hf|xai|AIza|Bearer)[-_ ]?[A-Za-z0-9*._-]{6,}")
_LONG_WORD = re.compile(r"(?=[A-Za-z0-9_*-]*[0-9*])[A-Za-z0-9_*-]{16,}")
_QUOTA = re.compile(r"credit|quota|billing|payment|insufficient (?:funds|balance)|balance is too low", re.IGNORECASE)
_CONTEXT = re.compile(r"context|prompt is too long|too many (?:input )?tokens|input is too long|token limit", re.I)
_PROMPT_ALONE = re.compile(r"flagged|moderation|content.?(?:policy|filter|management)|safety", re.IGNORECASE)
_REFUSES = re.compile(
    r"unsupported|not supported|unrecognized|unknown|unexpected|not permitted|invalid|should be|must be|too large|"
    r"at most|does not support|greater|less",
    re.IGNORECASE,
)


class HopelessError(RuntimeError):
    """Every further call would fail in the same way (key, quota, model name, parameter), so the run has to stop."""


class CallFailed(RuntimeError):
    """This call got no usable reply, but others may. The message holds the server's words, and no key.

    ``kind`` is equal for equal refusals. ``too_long`` says that the prompt was too long for the server.
    """

    def __init__(self, message: str, kind: str = "", too_long: bool = False) -> None:
        super().__init__(message)
        self.kind = kind or re.sub(r"[0-9]+", "#", message)
        self.too_long = too_long


class GaveUp(CallFailed):
    """No reply after all attempts, or the run was stopped. The same call may succeed later."""


class LimitReached(GaveUp):
    """The call could pass --max-cost, so it was not made."""


class Retry(Exception):
    """One attempt failed in a way that may pass. ``wait_s``: seconds that the server asks to wait, if it does.

    ``limited`` marks a rate limit: the server did no work, and such attempts do not count.
    """

    def __init__(self, reason: str, wait_s: float | None = None, limited: bool = False) -> None:
        super().__init__(reason)
        self.wait_s, self.limited = wait_s, limited


@dataclass(frozen=True)
class Refusal:
    """An error reply: the HTTP status (or the code in the body of a 200), the error's code, its message."""

    status: int
    code: str
    message: str

    def words(self, secrets: Sequence[str] = ()) -> str:
        """Return "HTTP status code: message" for people, with keys masked."""
        text = f"HTTP {self.status}" + (f" {self.code}" if self.code else "")
        said = masked(self.message, secrets, strictly=self.status in (401, 403))
        return f"{text}: {said}" if said else text

    def to_error(self, endpoint: Endpoint, sent: Mapping[str, Any], secrets: Sequence[str] = ()) -> Exception | None:
        """Return the exception that this refusal means. None: it may pass, so the caller decides when to retry."""
        words, status = self.words(secrets), self.status
        text = self.code + " " + self.message
        if status in (400, 403, 422) and _PROMPT_ALONE.search(text):
            return CallFailed(f"{words} (the server refuses this prompt)")
        remedy = _remedy(self, endpoint, sent)
        if remedy:
            return HopelessError(f"{words}, from {endpoint.base_url}: {remedy}")
        if status in RETRIED_STATUSES or status >= 500:
            return None
        if status == 413 or (status in (400, 422) and _CONTEXT.search(text)):
            return CallFailed(f"{words}: the prompt, with room for --max-tokens, does not fit the context window",
                              f"too long {status}", too_long=True)  # fmt: skip
        return CallFailed(words)


def _remedy(refusal: Refusal, endpoint: Endpoint, sent: Mapping[str, Any]) -> str:
    """Return what to do about a refusal that every call would get, or ""."""
    status, code = refusal.status, refusal.code
    lowered = refusal.message.lower()
    if code in QUOTA_CODES or status == 402 or (status in (400, 403) and _QUOTA.search(lowered)):
        return "the account's quota is used up; waiting does not help. Pay in, or use another key"
    if code == "model_not_found" or (status == 404 and code not in HOPELESS_CODES):
        return f"there is no such address, or no model {endpoint.model!r} there; name another"
    if status in (401, 403) or code in ("invalid_api_key", "account_deactivated", "access_terminated"):
        return f"the key in {endpoint.api_key_env} is missing, wrong, or not allowed to use this model"
    if 300 <= status < 400:
        return "redirects are not followed, because they would carry the key elsewhere; give the final --base-url"
    if status == 405:
        return "this address takes no such request; check --base-url"
    if status not in (400, 422):
        return ""
    if "stream" in lowered and "stream" not in sent:
        return "this model only answers as a stream; add --stream"
    if re.search(r"system.{0,20}(role|message|instruction|prompt)", lowered) and _REFUSES.search(lowered):
        return "this model takes no system text; add --merge-system"
    return _parameter_remedy(refusal, endpoint, sent)


def _parameter_remedy(refusal: Refusal, endpoint: Endpoint, sent: Mapping[str, Any]) -> str:
    """Return a remedy if the message rejects a parameter that is sent with every call."""
    lowered = refusal.message.lower()
    names = [name for name in set(sent) - {"model", "messages", "prompt"} if name.lower() in lowered]
    unsupported = refusal.code in ("unsupported_parameter", "unsupported_value")
    if not unsupported and not (names and _REFUSES.search(lowered) and "context" not in lowered):
        return ""
    if re.search(r"max_(completion_)?tokens.{0,20}too large|supports at most", lowered):
        return f"give a smaller --max-tokens than {endpoint.max_tokens} (generate: --max-new-tokens)"
    refused = sorted(names) or sorted(endpoint.parameters())
    return (
        f"it refuses one of {refused}; try --token-parameter max_completion_tokens, or --temperature none, or leave "
        "the option out"
    )


def refusal_in(status: int, body: Any) -> Refusal | None:
    """Find the error in a reply's body: ``{"error": ...}``, ``{"detail": ...}`` or ``{"object": "error", ...}``.

    Gateways also send errors with status 200; the code in the body then counts as the status.

    Returns:
        None if the status is 200 and the body holds no error.
    """
    error: Any = None
    if isinstance(body, dict):
        error = body.get("error") or (body.get("detail") if status != 200 else None)
        if error is None and (body.get("object") == "error" or status != 200):
            error = body
        if error is None:
            error = _error_of_choice(body)
    if error is None and status == 200:
        return None
    code, message, number = _parts(error)
    number = number or _STATUS_OF_CODE.get(code)
    return Refusal(status if status != 200 else number or 502, code, message)


def _error_of_choice(body: Mapping[str, Any]) -> Any:
    choices = body.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first.get("error") if isinstance(first, dict) else None


def _parts(error: Any) -> tuple[str, str, int | None]:
    """Return (code that is a word, message, code that is an HTTP status)."""
    if isinstance(error, list):
        places = [entry for entry in error if isinstance(entry, dict)]
        said = "; ".join(f"{'.'.join(map(str, _list(e.get('loc'))))}: {e.get('msg', '')}" for e in places)
        return "", said, None
    if not isinstance(error, dict):
        return "", str(error or ""), None
    codes = [str(error[name]) for name in ("code", "type") if error.get(name)]
    numbers = [int(code) for code in codes if re.fullmatch(r"[3-5][0-9][0-9]", code)]
    words = [code for code in codes if code.replace("_", "").isalnum() and not code.isdigit() and len(code) < 60]
    known = [code for code in words if code in HOPELESS_CODES or code == "context_length_exceeded"]
    message = error.get("message") or error.get("detail") or error.get("msg") or ("" if codes or not error else error)
    return (known or words or [""])[0], _text(message), next(iter(numbers), None)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: Any) -> str:
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except (ValueError, RecursionError):
        return ""


def masked(text: str, secrets: Sequence[str] = (), strictly: bool = False) -> str:
    """Return one line of at most 300 characters, with the secrets and everything that looks like a key masked.

    ``strictly`` also masks long words with digits, which after a refused key may be parts of it.
    """
    line = " ".join("".join(c if c.isprintable() else " " for c in text[: 20 * MOST_CHARACTERS]).split())
    for secret in sorted((s for s in secrets if len(s) >= 4), key=len, reverse=True):
        line = line.replace(secret, "***")
    line = _KEY_LIKE.sub("***", line)
    if strictly:
        line = _LONG_WORD.sub("***", line)
    return line if len(line) <= MOST_CHARACTERS else line[: MOST_CHARACTERS - 3] + "..."


class Streak:
    """Counts equal refusals in a row, to stop a run whose calls all fail in the same way."""

    def __init__(self, keep_going: bool = False) -> None:
        self.keep_going = keep_going
        self.any_reply = False
        self._kind, self._count = "", 0

    def reply(self) -> None:
        self.any_reply, self._count = True, 0

    def refused(self, error: CallFailed) -> str:
        """Count a failed call. Returns why the run has to stop, or ""."""
        self._count = self._count + 1 if error.kind == self._kind else 1
        self._kind = error.kind
        if self.keep_going or (error.too_long and self.any_reply):
            return ""
        if self._count >= (MANY if self.any_reply else FEW):
            return f"{self._count} calls in a row got the same refusal: {error}"
        return ""
