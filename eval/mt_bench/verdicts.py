"""The possible outcomes of one judging call, and the server's reply to it.

A reply that cannot be read and a call without a reply are separate outcomes. Inside this package they are never the
score -1. The values -1 and "error" only appear in the files, for FastChat's tools.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Winner = Literal["A", "B", "tie"]
Value = float | Winner
Status = Literal["graded", "unparsed", "failed"]


@dataclass(frozen=True)
class Reply:
    """The result of one successful HTTP request. :func:`.reply.outcome_of` says what it is.

    Attributes:
        text: the content as sent, with thoughts that stand in it; None if the server sent no content.
        thought: the thought that the server sent apart from the content.
        refusal: the server's own words where it refused.
        instead: what came in place of a content, for example a tool call.
        thought_tokens: how many of the completion tokens are thought, if the server says it.
        cleaned: how many characters no file can hold (a lone surrogate, NUL) and were replaced.
    """

    text: str | None
    model: str = ""
    finish_reason: str = ""
    system_fingerprint: str = ""
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    latency_s: float = 0.0
    attempts: int = 1
    thought: str = ""
    refusal: str = ""
    instead: str = ""
    thought_tokens: int | None = None
    cleaned: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Reply:
        """Read a dict that :meth:`to_dict` made. Fields of later versions are ignored."""
        return cls(**{name: data[name] for name in cls.__dataclass_fields__ if name in data})


@dataclass(frozen=True)
class Graded:
    """The judge gave a verdict: a rating in 1..10, or A, B or tie. ``fastchat`` is the result of FastChat's parser."""

    value: Value
    fastchat: Value | None
    status: Status = "graded"
    reason: str = ""


@dataclass(frozen=True)
class Unparsed:
    """The judge replied, but its verdict cannot be read without guessing."""

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
