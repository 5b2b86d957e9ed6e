"""Bodies of the verbs that start a run or look at one: train, export, show."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from salient_ds.config import ConfigError, load_config
from salient_ds.preflight import preflight


def print_problems(problems: list[str]) -> None:
    """One line each on stderr."""
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)


def launch(run: str, overrides: list[str], launcher: list[str], resume: str, overwrite: bool, processes: int) -> int:
    """Check the run here, then become the ``deepspeed`` launcher; returns (1) only if the check fails.

    Args:
        launcher: options handed to the launcher unchanged, such as --hostfile.
        processes: number the check assumes and the launcher is asked for (0: let the launcher decide, check for 1).
    """
    try:
        problems = preflight(load_config(run, overrides), max(processes, 1), run_source=run).problems
    except ConfigError as error:
        problems = error.problems
    if problems:
        print_problems(problems)
        return 1
    count = ["--num_accelerators", str(processes)] if processes else []
    script = ["--module", "salient_ds.train", run, *overrides, "--resume", resume]
    script += ["--overwrite"] if overwrite else []
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *count, *launcher, *script]
    os.execv(sys.executable, command)
    return 0  # not reached: the process is the launcher now


def export(
    run: str, form: str, target: str | None, overwrite: bool, base: str | None, dtype: str, pad_to: str | None
) -> int:
    """Write an adapter or a merged model; 1 with the reason if that is not possible."""
    import torch

    from salient_ds.export.run import export_run
    from salient_ds.zero.shard_files import CheckpointError

    folder = Path(target) if target else Path(run) / f"export-{form}"
    pad: Any = int(pad_to) if pad_to and pad_to.isdigit() else pad_to
    kind = None if form == "merged" else getattr(torch, dtype)
    try:
        written = export_run(Path(run), form, folder, overwrite, None, base, kind, pad)  # type: ignore[arg-type]
    except (ValueError, OSError, CheckpointError) as error:
        print_problems([str(error)])
        return 1
    print(written)
    return 0


def show(run: str) -> int:
    """The rank every matrix kept, as a heat map in the terminal, and the events that led there."""
    from rich.console import Console

    from salient_ds.monitor.events import read_records
    from salient_ds.monitor.heatmap import render_ranks

    folder = Path(run)
    try:
        modules = json.loads((folder / "run.json").read_text())["modules"]
        records = read_records(folder / "allocations.jsonl")
    except (OSError, KeyError, ValueError) as error:
        print_problems([f"{run} is not a run directory with allocation events: {error}"])
        return 1
    console = Console()
    for record in records:
        took = record.seconds_gather + record.seconds_solve + record.seconds_apply
        console.print(f"step {record.step}: total rank {record.total_rank} (budget {record.budget}), {took:.3f} s")
    if records:
        console.print(render_ranks(dict(zip(modules, records[-1].ranks, strict=True))))
    return 0
