"""Exit statuses, and the one place that turns errors which a user can mend into lines without a traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable

from salient_ds.strict import ConfigError, Reported

RUN_ERROR, USAGE_ERROR, STOPPED, INTERRUPTED = 1, 2, 75, 130
"""RUN_ERROR: the run failed. USAGE_ERROR: the command or the run file is wrong. STOPPED: the run has saved a checkpoint
and ended early, because of a signal or ``train.stop_after``; start it again. INTERRUPTED: Ctrl-C."""


def print_problems(problems: Iterable[str]) -> None:
    """Print each problem on a line of its own to stderr."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)


def known() -> tuple[type[BaseException], ...]:
    """Errors whose message is for users. Any other error is a fault of ours, and shows where it happened."""
    found: list[type[BaseException]] = [Reported, ValueError, OSError, MemoryError]
    for module, name in (("safetensors", "SafetensorError"), ("torch", "OutOfMemoryError")):
        if module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def sentences(error: BaseException) -> list[str]:
    """What a known error says: one sentence per problem."""
    if isinstance(error, ConfigError):
        return error.problems
    text = str(error).strip()
    if type(error).__name__ == "OutOfMemoryError":
        first = text.partition("GiB of which")[0].partition("\n")[0]
        return [f"{first}: lower train.micro_batch_size, or shard more with another ZeRO stage"]
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return [f"{error.filename}: {error.strerror}"]
    if isinstance(error, MemoryError) and not text:
        return ["there is not enough memory"]
    return [text or type(error).__name__]


def reported(work: Callable[[], int], status: int = RUN_ERROR) -> int:
    """Do ``work`` and return its exit status. A known error is printed, and ``status`` returned.

    SALIENT_TRACEBACK=1 shows where the error happened.
    """
    try:
        return work()
    except known() as error:
        if os.environ.get("SALIENT_TRACEBACK"):
            raise
        print_problems(sentences(error))
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
