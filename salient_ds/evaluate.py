"""Entry point of an evaluating process: ``deepspeed --module salient_ds.evaluate TARGET --task glue/rte ...``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from salient_ds.run.evaluate import run_evaluate
from salient_ds.run.process import join_described_group
from salient_ds.run.targets import EvaluateOptions


def main(
    target: Annotated[str, typer.Argument(help="Run, adapter or model.")],
    options: Annotated[str, typer.Argument(help="Options of `salient-ds evaluate` as JSON.")] = "{}",
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
) -> None:
    """Score a target on the processes that the launcher started."""
    join_described_group(local_rank)
    raise SystemExit(run_evaluate(target, EvaluateOptions(**json.loads(options))))


if __name__ == "__main__":
    typer.run(main)
