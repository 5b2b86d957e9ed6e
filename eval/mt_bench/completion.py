"""Read what a server sent: a JSON completion, or a stream of server-sent events put together to one.

Nothing here trusts the server. A wrong type anywhere is the same as nothing there, and token counts that are no counts
(negative, NaN, a text) are None, which the cost limit takes for the highest possible.
"""

from __future__ import annotations

import json
import math
from typing import Any

from .reply import clean_text, read_message
from .verdicts import Reply

MOST_TOKENS = 100_000_000
"""A larger number of tokens is taken for nonsense."""


class NoCompletion(ValueError):
    """The body is cut, or is no completion."""


def read_body(data: bytes, content_type: str = "") -> Any:
    """Parse the body of a reply.

    Raises:
        NoCompletion: it is neither JSON nor a stream of events that came to its end.
    """
    if "event-stream" in content_type or data.lstrip()[:5] in (b"data:", b": "):
        return _from_events(data)
    return _json(data)


def _json(data: bytes | str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise NoCompletion("reply is cut or is no completion") from None


def _from_events(data: bytes) -> Any:
    """Put the deltas of a stream together. The result has the form of a reply that was not streamed."""
    merged: dict[str, Any] = {}
    message: dict[str, Any] = {"role": "assistant", "content": None}
    finish, done = "", False
    for line in data.replace(b"\r\n", b"\n").split(b"\n"):
        name, _, value = line.partition(b":")
        if name.strip() != b"data":
            continue
        if value.strip() == b"[DONE]":
            done = True
            break
        chunk = _json(value)
        if not isinstance(chunk, dict):
            continue
        if chunk.get("error"):
            return chunk
        merged |= {key: chunk[key] for key in ("model", "system_fingerprint", "usage") if chunk.get(key)}
        choice = first_choice(chunk)
        if choice is None:
            continue
        if choice.get("error"):
            return {**merged, "choices": [{**choice, "message": message}]}
        delta = choice.get("delta") or choice.get("message") or {"content": choice.get("text")}
        _add(message, delta)
        finish = choice.get("finish_reason") or finish
    if not done and not finish:
        raise NoCompletion("the stream ended before the reply did")
    text = {"text": message["content"]} if isinstance(message["content"], str) else {}
    return {**merged, "choices": [{"index": 0, "message": message, **text, "finish_reason": finish}]}


def _add(message: dict[str, Any], delta: Any) -> None:
    """Append the texts of one delta. Lists of content parts are put one after the other."""
    if not isinstance(delta, dict):
        return
    for name, value in delta.items():
        before = message.get(name)
        if isinstance(value, str) and name != "role":
            message[name] = [*before, {"type": "text", "text": value}] if isinstance(before, list) else (
                (before or "") + value
            )  # fmt: skip
        elif isinstance(value, list):
            parts = [{"type": "text", "text": before}] if isinstance(before, str) and before else (before or [])
            message[name] = [*parts, *value]


def first_choice(body: Any) -> dict[str, Any] | None:
    """Return the first choice of a completion, or None."""
    choices = body.get("choices") if isinstance(body, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else None


def to_reply(body: Any, latency_s: float, attempt: int) -> Reply:
    """Make the reply of a completion's body.

    Raises:
        NoCompletion: there is no choice, or it holds neither a message nor a text.
    """
    choice = first_choice(body)
    if choice is None:
        raise NoCompletion("reply is cut or is no completion")
    message = choice.get("message")
    if not isinstance(message, dict) and "text" not in choice:
        raise NoCompletion("reply is cut or is no completion")
    prompt, completion = usage_of(body)
    return Reply(
        **read_message(message, choice.get("text")),
        model=_word(body.get("model")),
        finish_reason=_reason(choice.get("finish_reason")),
        system_fingerprint=_word(body.get("system_fingerprint")),
        prompt_tokens=prompt,
        completion_tokens=completion,
        latency_s=round(latency_s, 3),
        attempts=attempt,
        thought_tokens=_thought_tokens(body),
    )


def _thought_tokens(body: Any) -> int | None:
    """Return how many completion tokens the server counts as thought, or None."""
    usage = body.get("usage") if isinstance(body, dict) else None
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    return _count(details.get("reasoning_tokens")) if isinstance(details, dict) else None


def usage_of(body: Any) -> tuple[int | None, int | None]:
    """Return (prompt tokens, completion tokens) that the reply reports; None for what it does not.

    Some services leave the tokens of thoughts out of ``completion_tokens`` and bill them. They are in ``total_tokens``.
    """
    usage = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(usage, dict):
        return None, None
    prompt, completion = (_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
    total = _count(usage.get("total_tokens"))
    if prompt is not None and completion is not None and total is not None:
        completion = max(completion, total - prompt)
    return prompt, completion


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return int(value) if 0 <= value <= MOST_TOKENS and value == int(value) else None


def _reason(value: Any) -> str:
    return "" if value is None else _word(value) or f"of type {type(value).__name__}"


def _word(value: Any) -> str:
    return clean_text(value[:200])[0] if isinstance(value, str) else ""
