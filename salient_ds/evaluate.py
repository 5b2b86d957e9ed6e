"""Entry point of an evaluating process: ``deepspeed --module salient_ds.evaluate TARGET --task glue/rte ...``."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

from salient_ds.run.evaluate import run_evaluate
from salient_ds.run.targets import EvaluateOptions


def main(
    target: Annotated[str, typer.Argument(help="Run, adapter or model.")],
    options: Annotated[str, typer.Argument(help="Options of `salient-ds evaluate` as JSON.")] = "{}",
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
) -> None:
    """Score a target on the processes that the launcher started."""
    if local_rank >= 0:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    raise SystemExit(run_evaluate(target, EvaluateOptions(**json.loads(options))))


if __name__ == "__main__":
    typer.run(main)
