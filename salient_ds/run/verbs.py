"""Bodies of the commands train, search, convert-toml, export and show."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from salient_ds.check.start import PORT, StartOptions, check_start
from salient_ds.config.run import load_config
from salient_ds.host import free_port, is_taken
from salient_ds.run.changes import change_problems
from salient_ds.run.exits import USAGE_ERROR, print_problems, reported
from salient_ds.strict import ConfigError

KEEP_ALIVE = "-o ServerAliveInterval=15 -o ServerAliveCountMax=4"
"""Options of ssh for the launcher, which otherwise waits for ever for a node whose cable was cut."""

if TYPE_CHECKING:
    from salient_ds.export.meta import Form
    from salient_ds.run.search import SearchOptions
    from salient_ds.run.targets import EvaluateOptions


def launch(
    run: str,
    overrides: list[str],
    *,
    launcher: list[str],
    resume: str,
    changes: list[str],
    overwrite: bool,
    processes: int,
) -> int:
    """Check the run in this process, then replace the process by the ``deepspeed`` launcher.

    Args:
        launcher: options for the launcher, passed on unchanged, such as --hostfile.
        changes: keys whose value may differ from that in the checkpoint.
        processes: number of processes that the check assumes and the launcher starts on a node (0: the launcher
            decides, and the check assumes 1).

    Returns:
        1, only if the check fails.
    """
    try:
        start = StartOptions(processes, resume, overwrite, _port(launcher), elsewhere="--hostfile" in launcher)
        problems = check_start(load_config(run, overrides), start, run).problems
    except ConfigError as error:
        problems = error.problems
    problems = problems + change_problems(changes, resume)
    if problems:
        print_problems(problems)
        return 1
    if _port(launcher) is None and "--hostfile" not in launcher and is_taken(PORT):
        launcher = [*launcher, "--master_port", str(free_port())]
    script = ["salient_ds.train", run, *overrides, "--resume", resume] + (["--overwrite"] if overwrite else [])
    script += [word for key in changes for word in ("--change", key)]
    return _become_launcher(script, launcher, processes)


def last_step(run: str, overrides: list[str]) -> int:
    """Print the step of the newest checkpoint of a run, damaged or not; 0 if there is none. Returns the exit status."""
    from salient_ds.engine.shard_files import checkpoint_dirs, step_of

    folder = Path(load_config(run, overrides).output_dir) / "checkpoints"
    print(max(map(step_of, checkpoint_dirs(folder)), default=0))
    return 0


def _port(launcher: list[str]) -> int | None:
    """Where the processes will meet, if somebody said so."""
    return int(launcher[launcher.index("--master_port") + 1]) if "--master_port" in launcher else None


def _become_launcher(script: list[str], launcher: list[str], processes: int) -> int:
    if "--hostfile" in launcher:
        os.environ.setdefault("PDSH_SSH_ARGS_APPEND", KEEP_ALIVE)
    count = ["--num_accelerators", str(processes)] if processes else []
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", *count, *launcher, "--module", *script]
    os.execv(sys.executable, command)
    return 0  # not reached: the process is the launcher now


def search(run: str, overrides: list[str], options: SearchOptions, launcher: list[str], processes: int) -> int:
    """Search for modules before training.

    Args:
        processes: 1 searches in this process. Any other number replaces it by the ``deepspeed`` launcher (0: the
            launcher decides how many).

    Returns:
        The exit status.
    """
    from salient_ds.run.search import run_search

    if processes == 1:
        return run_search(run, overrides, options)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(options).items()
             if value is not None and not isinstance(value, bool)]  # fmt: skip
    flags += ["--scale-free"] if options.scale_free else []
    return _become_launcher(["salient_ds.search", run, *overrides, *flags], launcher, processes)


def evaluate(target: str, options: EvaluateOptions, launcher: list[str], processes: int) -> int:
    """Score a run, an adapter or a model.

    Args:
        processes: 1 scores in this process. Any other number replaces it by the ``deepspeed`` launcher (0: the launcher
            decides how many).

    Returns:
        The exit status.
    """
    from salient_ds.run.evaluate import run_evaluate

    if processes == 1:
        return run_evaluate(target, options)
    return _become_launcher(["salient_ds.evaluate", target, json.dumps(asdict(options))], launcher, processes)


def convert_toml(
    lora: str, shortcuts: str | None, model_type: str, num_layers: int | None, norm: str, output: str | None
) -> int:
    """Convert the released code's TOML files to an ``adapter`` section, and print it or write it to ``output``.

    Returns:
        0, or 1 after printing every problem.
    """
    from salient_ds.heterolora.released_toml import convert, to_yaml

    try:
        extra = Path(shortcuts) if shortcuts else None
        section = to_yaml(convert(Path(lora), extra, model_type, num_layers, norm))  # type: ignore[arg-type]
    except (ValueError, OSError) as error:
        print_problems(str(error).splitlines())
        return 1
    if output is None:
        print(section, end="")
    else:
        Path(output).write_text(section, encoding="utf-8")
    return 0


def export(
    run: str,
    form: str | None,
    target: str | None,
    *,
    overwrite: bool,
    base: str | None,
    dtype: str | None,
    pad_to: str | None,
) -> int:
    """Write an adapter or a merged model.

    Returns:
        0; 1 after printing why that is not possible; 2 if an option is wrong.
    """
    import torch

    from salient_ds.run.deviation import export_and_measure
    from salient_ds.run.shrink import rows_of

    folder = Path(target) if target else None
    kind = getattr(torch, dtype) if dtype is not None else None
    try:
        pad = rows_of(pad_to)
    except ValueError as error:
        print_problems([str(error)])
        return USAGE_ERROR

    def work() -> int:
        chosen = cast("Form | None", form)  # the command line has checked it
        written = export_and_measure(Path(run), chosen, folder, overwrite=overwrite, base=base, dtype=kind, pad_to=pad)
        print(written)
        return 0

    return reported(work)


def show(run: str) -> int:
    """Print the allocation events of a run, and the rank that every matrix kept as a heat map."""
    from rich.console import Console

    from salient_ds.monitor.events import read_records
    from salient_ds.monitor.heatmap import render_ranks
    from salient_ds.own_files import read_object, reading

    folder = Path(run)
    try:
        with reading(folder / "run.json"):
            modules = list(read_object(folder / "run.json")["modules"])
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
