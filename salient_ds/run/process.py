"""What every launched process does around its work: join the process group, report an error in one line, leave."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from salient_ds.run.exits import RUN_ERROR, STOPPED, USAGE_ERROR, known, print_problems, sentences
from salient_ds.run.messages import leave_bars_to_main
from salient_ds.run.stopping import Stopped, StopRequest
from salient_ds.run.whereabouts import Whereabouts
from salient_ds.zero.launchers import describe_process

if TYPE_CHECKING:
    import torch


def join_described_group(local_rank: int = -1) -> None:
    """Read what the launcher (deepspeed, torchrun, mpirun, srun) told this process, and end it if that is not enough.

    Args:
        local_rank: number of this process on its node, as the launcher's option gave it; -1: there was none.
    """
    problems = describe_process(os.environ, local_rank)
    if problems:
        print_problems(problems)  # every process: which of them is the main one may be what is wrong
        raise SystemExit(USAGE_ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch logs 20 lines per failed connection


def refused(problems: list[str]) -> int:
    """Print the problems on the main process and return the exit status (0: there are none)."""
    if problems and int(os.environ.get("RANK", "0")) == 0:
        print_problems(problems)
    return USAGE_ERROR if problems else 0


def launched(
    work: Callable[[torch.device], None],
    timeout_minutes: float,
    where: Whereabouts | None = None,
    stop_request: StopRequest | None = None,
) -> int:
    """Run ``work`` in the process group that the launcher described, and return the exit status.

    Errors that a user can fix are printed in one line without a traceback (SALIENT_TRACEBACK=1 shows it). The process
    then exits at once and does not wait for others that did not fail. Meanwhile a watchdog ends it if others are
    silent.

    Args:
        work: called with this process' device.
        timeout_minutes: how long a process waits for the others.
        where: kept up to date by ``work``.
        stop_request: is told if the launcher has ended; None: this process ends too.
    """
    from salient_ds.run.collective_errors import in_collective, unable_to_join, without_frames
    from salient_ds.run.watchdog import GO_ON, watch
    from salient_ds.zero.collectives import world
    from salient_ds.zero.environment import start, stop

    where = where or Whereabouts()
    leave_bars_to_main(int(os.environ.get("RANK", "0")))
    try:
        with without_frames():
            device = start(timeout_minutes)
            watchdog = watch(timeout_minutes, where, stop_request)
    except (RuntimeError, OSError) as error:
        if os.environ.get("SALIENT_TRACEBACK"):
            raise
        _leave(f"error: {unable_to_join(error, os.environ)}")
    try:
        work(device)
    except Stopped as end:
        _leave(str(end) if world().global_rank == 0 else "", STOPPED)
    except Exception as error:
        collective = None if isinstance(error, known()) else in_collective(error)
        if os.environ.get("SALIENT_TRACEBACK") or not (isinstance(error, known()) or collective):
            raise
        here = world().global_rank
        subject = f"error on process {here}" if here else "error"
        watchdog.take_over()
        if collective:
            missing = watchdog.missing() or "all processes answer"
            _leave(f"{subject}: a collective failed in {where}: {missing} ({collective}). {GO_ON}")
        if here:  # the main process usually has the same error: let it report first; the launcher stops the others
            time.sleep(3)
        _leave("\n".join(f"{subject}: {text}" for text in sentences(error)))
    watchdog.close()
    stop()
    return 0


def _leave(text: str, status: int = RUN_ERROR) -> NoReturn:
    """Print a text and end this process at once: launchers send signals to processes that outlive others."""
    if text:
        print(text, file=sys.stderr, flush=True)
    os._exit(status)
