"""What all configuration sections share: strict models, one error type, and hints for misspelt names. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict


class Reported(Exception):
    """Base of errors whose message is for users: they are printed in one line, without a traceback."""


class ConfigError(ValueError):
    """One or more problems in a run configuration, each a full sentence with value, bound and remedy."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class Strict(BaseModel):
    """Base of all configuration models: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


_DEEPEST, _LARGEST, _MOST_VALUES = 50, 2**63, 200_000


def extreme(data: Any) -> str | None:
    """Why plain data (of a YAML or JSON file) is no configuration, as a clause; None if it may be one.

    Data that is nested too deeply, numbers beyond 64 bits and millions of values are refused here, because other code
    would fail on them in many places, or take minutes.
    """
    queue, seen = [(data, 1)], 0
    while queue:
        value, depth = queue.pop()
        seen += 1
        if depth > _DEEPEST:
            return f"it is nested more than {_DEEPEST} levels deep"
        if seen > _MOST_VALUES:
            return f"it holds more than {_MOST_VALUES:,} values"
        if isinstance(value, dict):
            queue += [(item, depth + 1) for pair in value.items() for item in pair]
        elif isinstance(value, list | tuple):
            queue += [(item, depth + 1) for item in value]
        elif isinstance(value, int) and not -_LARGEST <= value < _LARGEST:
            return f"it holds the whole number {_short(value)}, which has more than 64 bits"
        elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
            return f"it holds the text {ascii(value[:40])}, which is not valid Unicode"
    return None


def _short(value: int) -> str:
    return hex(value)[:14] + "..." if value.bit_length() > 70 else str(value)


def expanded(path: str) -> str:
    """A path with ``~`` at its begin replaced by the home directory it means.

    Raises:
        ValueError: there is no such home directory.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError(f"{path!r}: {error}; write the path in full") from error


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known name that is closest to ``name``; None if no similarity reaches ``likeness`` (0 to 1)."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return close[0] if close else None


def did_you_mean(name: str, known: Iterable[str], before: str = "", after: str = "") -> str:
    """A hint such as ``did you mean 'rank'?`` between ``before`` and ``after``; empty if no known name is close."""
    close = nearest(name, known)
    return f"{before}did you mean {close!r}?{after}" if close is not None else ""
