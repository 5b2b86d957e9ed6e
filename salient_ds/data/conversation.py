"""The type that every data format is converted to, and the one error class for bad data. Standard library only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

USER = "user"
ASSISTANT = "assistant"
TOOL = "tool"
SYSTEM = "system"
OnBadRow = Literal["error", "skip"]
"""What to do with a bad row: refuse the file, or leave the row out and count it."""
IGNORED = -100  # the label that torch's cross-entropy ignores


class RowError(ValueError):
    """An error in one row; the reader adds the line. `kind` is the short name that problems are counted by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Turn(NamedTuple):
    """One message; `role` is "user", "assistant" or "tool".

    `train`: an answer carries labels. `extra`: further keys that only a chat template can print, such as tool_calls and
    reasoning_content.
    """

    role: str
    text: str
    train: bool = True
    extra: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns of user and assistant, the first by the user; results of tools lie between turns of the assistant.

    `instruction` and `input` are the separate fields of an Alpaca row (None for other formats). The alpaca template
    prints them under separate headings. Other templates use `turns[0]`, where they are joined. `source` is (path,
    line), or (path, row) for formats without lines; both count from 1. `tools` are JSON schemas that the answers may
    call, and `template_kwargs` further variables of the chat template; only the tokenizer's own template takes them.
    `plain`: plain text, in the only turn, which no template touches. `unit`: what messages call the number in `source`.
    """

    system: str | None
    turns: tuple[Turn, ...]
    instruction: str | None = None
    input: str | None = None
    source: tuple[str, int] = ("", 0)
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None
    plain: bool = False
    unit: str = "line"

    @property
    def answers(self) -> tuple[str, ...]:
        """The assistant's texts, in order."""
        return tuple(turn.text for turn in self.turns if turn.role == ASSISTANT)

    @property
    def where(self) -> str:
        """For messages: "train.jsonl, line 3"."""
        path, line = self.source
        return f"{path}, {self.unit} {line}" if path else "this conversation"

    def messages(self) -> list[dict[str, Any]]:
        """Role/content dicts for `apply_chat_template`, the system message first, each with the turn's further keys."""
        head = [{"role": SYSTEM, "content": self.system}] if self.system is not None else []
        return head + [{"role": turn.role, "content": turn.text, **(turn.extra or {})} for turn in self.turns]

    def until(self, turns: int) -> Conversation:
        """The conversation up to its first `turns` turns."""
        return replace(self, turns=self.turns[:turns])


class Problem(NamedTuple):
    """One error in a file. Problems are counted by `kind`. `line` is 0 if the problem has no line."""

    kind: str
    line: int
    message: str


class DataError(ValueError):
    """Bad input data. `problems` holds the first few in full, `counts` how many there are of each kind."""

    def __init__(
        self, source: str, problems: Sequence[Problem], counts: Counter[str] | None = None, unit: str = "line"
    ) -> None:
        self.source = source
        self.problems = list(problems)
        self.counts = Counter(p.kind for p in problems) if counts is None else counts
        super().__init__(self._text(unit))

    @classmethod
    def of(cls, source: str, kind: str, message: str) -> DataError:
        """The error for a problem of the whole file."""
        return cls(source, [Problem(kind, 0, message)])

    def _text(self, unit: str) -> str:
        total = sum(self.counts.values())
        listed = [f"{unit} {p.line}: {p.message}" if p.line else p.message for p in self.problems]
        if total == 1:
            return f"{self.source}: {listed[0]}"
        kinds = ", ".join(f"{count} x {kind}" for kind, count in self.counts.most_common())
        more = [f"  ... and {total - len(listed)} more"] if total > len(listed) else []
        return "\n".join([f"{self.source}: {total} problems ({kinds})", *(f"  {text}" for text in listed), *more])


class ProblemLog:
    """Collects problems while a file is read: keeps the first `limit`, counts all of them."""

    def __init__(self, source: str, unit: str = "line", limit: int = 10) -> None:
        self.source, self.unit, self.limit = source, unit, limit
        self.problems: list[Problem] = []
        self.counts: Counter[str] = Counter()

    def add(self, problem: Problem) -> None:
        """Counts the problem and keeps it if it is among the first."""
        self.counts[problem.kind] += 1
        if len(self.problems) < self.limit:
            self.problems.append(problem)

    def extend(self, other: ProblemLog) -> None:
        """Adds the problems of rows that follow."""
        self.source, self.unit = self.source or other.source, other.unit if other.source else self.unit
        self.counts += other.counts
        self.problems += other.problems[: max(0, self.limit - len(self.problems))]

    def raise_if_any(self) -> None:
        """Raises DataError when anything was added."""
        if self.problems:
            raise DataError(self.source, self.problems, self.counts, self.unit)
