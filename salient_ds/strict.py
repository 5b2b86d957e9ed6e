"""What all configuration sections share: strict models, one error type, and hints for misspelt names. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict


class ConfigError(ValueError):
    """One or more problems in a run configuration, each a full sentence with value, bound and remedy."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join(problems))


class Strict(BaseModel):
    """Base of all configuration models: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


def nearest(name: str, known: Iterable[str], likeness: float = 0.6) -> str | None:
    """The known name that is closest to ``name``; None if no similarity reaches ``likeness`` (0 to 1)."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=likeness)
    return close[0] if close else None


def did_you_mean(name: str, known: Iterable[str], before: str = "", after: str = "") -> str:
    """A hint such as ``did you mean 'rank'?`` between ``before`` and ``after``; empty if no known name is close."""
    close = nearest(name, known)
    return f"{before}did you mean {close!r}?{after}" if close is not None else ""
