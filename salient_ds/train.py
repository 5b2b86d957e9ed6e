"""Entry point of a training process: ``deepspeed --module salient_ds.train run.yaml [key=value ...]``.

Imports no torch before the configuration has been checked, so that the main process reports a mistake within a second.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from salient_ds.check.preflight import preflight
from salient_ds.config.run import RunConfig, load_config
from salient_ds.run.changes import ChangeOption, change_problems
from salient_ds.run.exits import known, sentences
from salient_ds.run.process import join_described_group, launched, refused
from salient_ds.run.stopping import StopRequest

if TYPE_CHECKING:
    import torch


def main(
    run: Annotated[str, typer.Argument(help="Run file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value pairs that replace settings of the run file.")
    ] = None,
    resume: Annotated[
        str, typer.Option(help='"auto" (continue from the last whole checkpoint) or the path of a checkpoint.')
    ] = "never",
    change: ChangeOption = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an earlier run in output_dir.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
) -> None:
    """Train one run on the processes that the launcher started."""
    stop = StopRequest()
    stop.listen()
    join_described_group(local_rank)
    try:
        config = load_config(run, overrides)
        problems = preflight(config, world_size=int(os.environ.get("WORLD_SIZE", "1")), quick=True).problems
    except known() as error:
        problems = sentences(error)
    changes = list(dict.fromkeys(change or []))
    status = refused(problems + change_problems(changes, resume))
    raise SystemExit(status or run_training(config, resume, overwrite, changes, stop))


def run_training(
    config: RunConfig,
    resume: str = "never",
    overwrite: bool = False,
    changes: Sequence[str] = (),
    stop: StopRequest | None = None,
) -> int:
    """Train in this process and return the exit status.

    Args:
        stop: asked in every step whether to save and end; None: only ``train.stop_after`` ends the run early.
    """
    from salient_ds.run.messages import Messages
    from salient_ds.run.same_everywhere import agreed, setup_facts
    from salient_ds.run.training import Training
    from salient_ds.run.whereabouts import Whereabouts

    stop = stop or StopRequest()
    stop.seconds = config.train.stop_after
    where, messages = Whereabouts(), Messages(int(os.environ.get("RANK", "0")))
    messages.listen()

    def work(device: torch.device) -> None:
        agreed(lambda: setup_facts(config), device)
        Training(config, device, stop=stop, where=where, messages=messages).run(resume, overwrite, changes)

    try:
        return launched(work, config.train.timeout_minutes, where, stop)
    finally:
        messages.close()


if __name__ == "__main__":
    typer.run(main)
