"""Exit statuses, and how problems are printed."""

from __future__ import annotations

import sys
from collections.abc import Iterable

RUN_ERROR, USAGE_ERROR = 1, 2
"""RUN_ERROR: the run failed. USAGE_ERROR: the command or the run file is wrong."""


def print_problems(problems: Iterable[str]) -> None:
    """Print each problem on a line of its own to stderr."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
