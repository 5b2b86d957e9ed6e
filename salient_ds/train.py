"""Entry of a training process: ``deepspeed --module salient_ds.train run.yaml [key=value ...]``.

Imports no torch until the configuration is known to be sound: a mistake is reported in a second, by the main process.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import typer

from salient_ds.check.preflight import preflight
from salient_ds.config.run import RunConfig, load_config
from salient_ds.strict import ConfigError

USAGE_ERROR, RUN_ERROR = 2, 1


def main(
    run: Annotated[str, typer.Argument(help="Run YAML.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value ...")] = None,
    resume: Annotated[str, typer.Option(help='"auto": go on from the last whole checkpoint; or its path.')] = "never",
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in output_dir.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
) -> None:
    """Train one run on the processes that the launcher started."""
    if local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    try:
        config = load_config(run, overrides)
        problems = preflight(config, world_size=int(os.environ.get("WORLD_SIZE", "1")), quick=True).problems
    except ConfigError as error:
        problems = error.problems
    if problems:
        if int(os.environ.get("RANK", "0")) == 0:
            for problem in problems:
                print(f"error: {problem}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR)
    raise SystemExit(run_training(config, resume, overwrite))


def run_training(config: RunConfig, resume: str = "never", overwrite: bool = False) -> int:
    """Train in this process and return the exit status; errors that a user can mend are printed without a traceback."""
    from salient_ds.engine.reports import NonFiniteLoss
    from salient_ds.engine.shard_files import CheckpointError
    from salient_ds.monitor.directory import RunDirectoryError
    from salient_ds.run.training import Training
    from salient_ds.zero.collectives import world
    from salient_ds.zero.environment import start, stop

    device = start(config.train.timeout_minutes)
    try:
        Training(config, device).run(resume, overwrite)
    except (RunDirectoryError, CheckpointError, NonFiniteLoss, ValueError) as error:
        if os.environ.get("SALIENT_TRACEBACK"):
            raise
        rank = world()[0]
        if rank:  # usually the main process has the same error: it speaks first, and the launcher stops the others
            time.sleep(3)
        print(f"error: {error}" if rank == 0 else f"error on process {rank}: {error}", file=sys.stderr, flush=True)
        os._exit(RUN_ERROR)  # without waiting for processes that did not fail
    stop()
    return 0


if __name__ == "__main__":
    typer.run(main)
