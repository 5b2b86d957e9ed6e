"""The values that one judging call can end in, and what the judge's server said about the call.

A reply that cannot be read and a call that never got an answer are values of their own. They are never the
score -1 inside this package; -1 and "error" appear only in the files, for FastChat's readers.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Winner = Literal["A", "B", "tie"]
Value = float | Winner
Status = Literal["graded", "unparsed", "failed"]


@dataclass(frozen=True)
class Reply:
    """What one successful HTTP exchange returned. ``text`` is None when the server sent no content."""

    text: str | None
    model: str = ""
    finish_reason: str = ""
    system_fingerprint: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_s: float = 0.0
    attempts: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Reply:
        """Read a dict written by ``to_dict``; fields of a later version are ignored."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


@dataclass(frozen=True)
class Graded:
    """The judge gave a verdict: a rating 1..10, or A, B or tie. ``fastchat`` is the other parser's reading."""

    value: Value
    fastchat: Value | None
    status: Status = "graded"
    reason: str = ""


@dataclass(frozen=True)
class Unparsed:
    """The judge answered, but no verdict can be read from it without guessing."""

    reason: str
    fastchat: Value | None = None
    value: None = None
    status: Status = "unparsed"


@dataclass(frozen=True)
class Failed:
    """There is nothing to read: no answer to judge, no reply, or a reply without content."""

    reason: str
    fastchat: None = None
    value: None = None
    status: Status = "failed"


Verdict = Graded | Unparsed | Failed
