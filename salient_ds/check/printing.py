"""``salient-ds check``: prints the pre-flight report of a run, as text or as JSON. No torch, no GPU, no network."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from salient_ds.adapters.presets import PREFIX
from salient_ds.check.fit import fit_facts, fit_text
from salient_ds.check.memory import GIB
from salient_ds.check.pace import pace, pace_text
from salient_ds.check.report import Report
from salient_ds.check.scale import Cluster, scale_facts, scale_table
from salient_ds.check.start import StartOptions, check_start
from salient_ds.check.token_table import print_tokens
from salient_ds.config.run import RunConfig, load_config
from salient_ds.config.speed import SpeedConfig
from salient_ds.strict import ConfigError

_FIRST, _LAST = 3, 2
"""Events shown from the start and the end of a long schedule."""
_COLUMNS = {
    "base": "base",
    "adapters": "adapt",
    "optimizer": "optim",
    "gradients": "grads",
    "buffers": "bufs",
    "statistics": "stats",
    "activations": "activ",
    "peak": "peak",
    "host": "host",
}


def run_check(
    path: str,
    overrides: list[str] | None = None,
    gpus: int = 1,
    as_json: bool = False,
    start: StartOptions | None = None,
    cluster: Cluster | None = None,
    nodes: int = 0,
    memory: int = 0,
) -> int:
    """Check the run file and print the report. Returns 0 if the run can start, else 1 after printing every problem.

    Args:
        nodes: above 0, also a model of that many nodes of the ``cluster``.
        memory: above 0, also what fits into so many bytes.
    """
    run: RunConfig | None = None
    try:
        run = load_config(path, overrides)
        report = check_start(run, start or StartOptions(gpus), path)
        report.facts["pace"] = pace(run, report)
        if memory:
            report.facts["fit"] = fit_facts(run, report, memory)
        if nodes:
            facts = scale_facts(run, report, cluster or Cluster(), nodes)
            if facts is None:
                report.notes.append("--nodes: no model, because the layers of the base are not known before training")
            else:
                report.facts["scale"] = facts
    except ConfigError as error:
        report = Report(problems=error.problems)
    if as_json:
        print(json.dumps({"problems": report.problems, "notes": report.notes, "facts": report.facts}, indent=2))
    else:
        _print_report(path, run, report)
    return 1 if report.problems else 0


def _print_report(path: str, run: RunConfig | None, report: Report) -> None:
    # no markup: rich would read "[train]" in the name of a data set as a style
    plain: dict[str, Any] = {"soft_wrap": True, "highlight": False, "markup": False, "emoji": False}
    out = Console(**plain)
    if run is not None:
        _print_summary(out, path, run, report.facts)
    if report.facts.get("events"):
        out.print(_event_table(report.facts["events"]))
    if "tokens" in report.facts:
        print_tokens(out, report.facts["tokens"])
    if "memory" in report.facts:
        out.print(_memory_table(report.facts))
    if "scale" in report.facts:
        out.print(scale_table(report.facts["scale"]))
    for note in report.notes:
        out.print(f"note: {note}", style="yellow")
    errors = Console(file=sys.stderr, **plain)
    for problem in report.problems:
        errors.print(f"error: {problem}", style="red")
    if report.problems:
        count = len(report.problems)
        errors.print(f"{path}: {count} problem{'s' if count > 1 else ''}", style="bold red")
    else:
        out.print(f"{path}: ready to start", style="bold green")


def _print_summary(out: Console, path: str, run: RunConfig, facts: dict[str, Any]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    train = run.train
    table.add_row("run", f"{path} -> {run.output_dir}")
    parameters = facts.get("base_parameters")
    size = f" ({_count(parameters)} parameters)" if parameters else ""
    table.add_row("model", f"{run.model.path}{size}, {train.precision}")
    kind = f"template {run.data.template}" if run.data.task is None else f"task {run.data.task.name}"
    if isinstance(run.data.train, str):
        table.add_row("data", f"{run.data.train}{_rows(facts)}, {kind}")
    else:
        table.add_row("data", f"{len(run.data.train)} sets{_rows(facts)}, {kind}")
        for one in facts.get("sets", ()):
            held_out = f", {one['held_out']} held out" if one["held_out"] else ""
            times = f" x {one['weight']:g} = {one['per_epoch']} per epoch"
            table.add_row("", f"{one['path']}: {one['rows']} rows{times}{held_out}")
    zero = facts.get("zero")
    if zero:
        parts = [f"stage {zero['stage']}"]
        parts += [name.replace("_", " ") for name in ("offload_optimizer", "offload_param") if zero[name]]
        table.add_row("ZeRO", f"{run.deepspeed}: {', '.join(parts)}")
    if "total_steps" in facts:
        exact = "" if facts["total_steps_exact"] else "at most " if run.data.packing else "about "
        table.add_row("steps", f"{exact}{facts['total_steps']} of {train.global_batch_size} examples")
    processes = facts.get("processes", 1)
    per_step = facts.get("ds_config", {}).get("gradient_accumulation_steps")
    if per_step:
        table.add_row("batch", f"{train.micro_batch_size} x {per_step} accumulated x {processes} processes")
    if "modules" in facts:
        table.add_row("adapters", f"{run.method.name} on {facts['modules']} matrices, rank {run.adapter.rank}")
    if facts.get("targets"):
        chosen = run.adapter.target_modules
        named = f"{chosen}: " if isinstance(chosen, str) and chosen.startswith(PREFIX) else ""
        table.add_row("targets", named + ", ".join(f"{name} {count}" for name, count in facts["targets"].items()))
    if "in_full" in facts:
        full = facts["in_full"]
        fresh = f"; fresh: {', '.join(full['fresh'])}" if full["fresh"] else ""
        table.add_row(
            "trained in full", f"{', '.join(full['modules'])} ({_count(full['parameters'])} parameters{fresh})"
        )
    if "sigma_ratio" in facts:
        table.add_row("learning rate", f"{run.train.lr:g}, singular values {facts['sigma_ratio']:.3g} times as much")
    if run.speed != SpeedConfig():
        changed = run.speed.model_dump(exclude_defaults=True)
        table.add_row("execution", ", ".join(f"{key}: {str(value).lower()}" for key, value in changed.items()))
    if "trainable_end" in facts:
        table.add_row("sum of ranks", f"{facts['initial_total']} -> {facts['target_total']}")
        start, end = _count(facts["trainable_start"]), _count(facts["trainable_end"])
        spread = "" if start == end else " (if spread evenly)"
        table.add_row("trainable", f"{start} parameters -> {end}{spread}")
    if "checkpoint_bytes" in facts:
        free = f", {_size(facts['free_bytes'])} free" if "free_bytes" in facts else ""
        table.add_row("checkpoint", f"{_size(facts['checkpoint_bytes'])} each{free}")
    if "pace" in facts:
        table.add_row("speed", pace_text(facts["pace"]))
    if "fit" in facts:
        table.add_row("fits", fit_text(facts["fit"]))
    out.print(table)


def _event_table(events: list[dict[str, int]]) -> Table:
    table = Table(title=f"allocation events ({len(events)})", title_justify="left", box=SIMPLE_HEAD)
    for name in ("event", "after step", "budget (sum of ranks)", "window (steps)"):
        table.add_column(name, justify="right")
    shown = list(enumerate(events, 1))
    if len(shown) > _FIRST + _LAST:
        shown = [*shown[:_FIRST], (0, {}), *shown[-_LAST:]]
    for number, event in shown:
        if not event:
            table.add_row("...", "...", "...", "...")
            continue
        last = event["window_start"] + event["window"] - 1
        window = f"{event['window_start']}..{last} ({event['window']})"
        table.add_row(str(number), str(event["step"]), str(event["total_rank"]), window)
    return table


def _memory_table(facts: dict[str, Any]) -> Table:
    own = facts["this_run"]
    rows = dict(facts["memory"])
    if own not in rows.values():
        rows["this run"] = own
    unit, name = (GIB, "GiB") if max(row["peak"] for row in rows.values()) >= GIB else (2**20, "MiB")
    title = f"estimated memory per process at the initial rank, {facts['processes']} in all ({name})"
    caption = "* this run; the peak is below the sum, because not everything is alive at once"
    table = Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("ZeRO", no_wrap=True)
    for header in _COLUMNS.values():
        table.add_column(header, justify="right", no_wrap=True)
    for label, row in rows.items():
        cells = ["?" if row[column] is None else _short(row[column] / unit) for column in _COLUMNS]
        table.add_row(label + (" *" if row == own else ""), *cells, style="bold" if row == own else None)
    return table


def _rows(facts: dict[str, Any]) -> str:
    if "rows" not in facts:
        return ""
    held_out = facts.get("eval_rows", facts.get("held_out_rows"))
    epoch = " per epoch" if "sets" in facts else ""
    return f" ({facts['rows']} rows{epoch}" + (f", {held_out} held out)" if held_out else ")")


def _count(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return str(number)


def _short(value: float) -> str:
    """One decimal; "-" for 0."""
    if value == 0:
        return "-"
    return "<0.1" if value < 0.05 else f"{value:.1f}"


def _size(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"
