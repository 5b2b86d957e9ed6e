"""Exit statuses, and how problems are printed."""

from __future__ import annotations

import sys
from collections.abc import Iterable

RUN_ERROR, USAGE_ERROR = 1, 2
"""The run failed; the command or the run file is wrong."""


def print_problems(problems: Iterable[str]) -> None:
    """One line each on stderr."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
