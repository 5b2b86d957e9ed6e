"""What every launched process does around its work: join the process group, report an error in one line, leave."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from salient_ds.run.exits import RUN_ERROR, STOPPED, USAGE_ERROR, known, print_problems, sentences
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


def refused(problems: list[str]) -> int:
    """Print the problems on the main process and return the exit status (0: there are none)."""
    if problems and int(os.environ.get("RANK", "0")) == 0:
        print_problems(problems)
    return USAGE_ERROR if problems else 0


def launched(work: Callable[[torch.device], None], timeout_minutes: float) -> int:
    """Run ``work`` in the process group that the launcher described, and return the exit status.

    Errors that a user can fix are printed in one line without a traceback (SALIENT_TRACEBACK=1 shows it). The process
    then exits at once and does not wait for others that did not fail.

    Args:
        work: called with this process' device.
        timeout_minutes: how long a process waits for the others in a collective.
    """
    from salient_ds.run.stopping import Stopped
    from salient_ds.zero.collectives import world
    from salient_ds.zero.environment import start, stop

    device = start(timeout_minutes)
    try:
        work(device)
    except Stopped as end:
        if world().global_rank == 0:
            print(end, file=sys.stderr, flush=True)
        os._exit(STOPPED)  # at once: launchers send signals to processes that outlive others
    except known() as error:
        if os.environ.get("SALIENT_TRACEBACK"):
            raise
        here = world().global_rank
        if here:  # the main process usually has the same error: let it report first; the launcher stops the others
            time.sleep(3)
        where = f"error on process {here}" if here else "error"
        print("\n".join(f"{where}: {text}" for text in sentences(error)), file=sys.stderr, flush=True)
        os._exit(RUN_ERROR)
    stop()
    return 0
