"""Do the methods find ranks? Students of every method learn from a teacher with known, unequal ranks per matrix.

    python eval/bench/planted_rank.py --quick            # tiny, under a minute
    python eval/bench/planted_rank.py --workers 16       # every method, both regimes, five seeds

Every student's learning rate is tuned on a separate seed. All students end at the same total rank. Training is plain
torch on the CPU, with one thread per student and no DeepSpeed.
"""

from __future__ import annotations

if not __package__:
    import standalone

    __package__ = standalone.PACKAGE

import datetime
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from . import record
from .planted_plan import ARMS, REGIMES, Arm, ProblemSize, Regime, Training, method_config
from .planted_report import COLUMNS, draw, readme, table_row
from .planted_summary import Row, best_rates, findings, summarise
from .planted_train import train
from .worker import cpu_name, installed

USAGE_ERROR, INCOMPLETE = 2, 1
PACKAGES = ("torch", "numpy", "scipy", "pydantic")
QUICK_SIZE = ProblemSize(planted=(0, 1, 2, 5), width=24, hidden=32, train_examples=4096, test_examples=1024)
QUICK_ARMS = "true-ranks,lora,adalora,lora2,increlora,salientlora-paper-released,salientlora-paper-robust"
QUICK_TRAINING = Training(steps=120, batch=64, initial_rank=6, window_initial=5, window_final=30)
Task = tuple[Arm, ProblemSize, Training, Regime, int, float]


def main(
    arms: Annotated[str, typer.Option(help="Students by name, separated by commas; default: all.")] = "",
    regimes: Annotated[str, typer.Option(help="Some of equal_energy, equal_singular_value, power_law.")] = ",".join(
        REGIMES
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds: the results use 0, 1, ...")] = 5,
    tuning_seed: Annotated[int, typer.Option(min=0, help="Seed for tuning learning rates; not a result seed.")] = 1000,
    lrs: Annotated[str, typer.Option(help="Learning rates to try.")] = "3e-3,1e-2,3e-2",
    steps: Annotated[int, typer.Option(min=0, help="Training steps (0: the default).")] = 0,
    workers: Annotated[int, typer.Option(min=0, help="Processes (0: one per core).")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A tiny problem, at most two seeds, one learning rate, fewer students.")
    ] = False,
    deadline: Annotated[float, typer.Option(help="Start no run after this many seconds (0: no limit).")] = 0,
    out: Annotated[Path, typer.Option(help="Folder in which the record's folder is created.")] = record.REPOSITORY
    / "eval"
    / "records",
    commit: Annotated[str, typer.Option(help="Commit named in the record, if there is no git.")] = "",
) -> None:
    """Train all students, compare their ranks with the planted ones, and write a record."""
    began = time.monotonic()
    size, training = (QUICK_SIZE, QUICK_TRAINING) if quick else (ProblemSize(), Training())
    if steps:
        training = replace(training, steps=steps)
    if quick:
        seeds, lrs, regimes, arms = min(seeds, 2), "2e-2", regimes.split(",")[0], arms or QUICK_ARMS
    try:
        chosen, left_out = usable(pick(arms, {arm.name: arm for arm in ARMS}, "--arms"), size, training)
        where = pick(regimes, {regime: regime for regime in REGIMES}, "--regimes")
        rates = learning_rates(lrs)
        if tuning_seed < seeds:
            raise ValueError(f"--tuning-seed {tuning_seed} is one of the seeds 0 to {seeds - 1} of the results")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
    workers = workers or len(os.sched_getaffinity(0))
    page: dict[str, Any] = {
        "command": record.recorded_command("planted_rank.py", sys.argv[1:]), "commit": commit or record.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "hardware": {"device": "cpu", "cpu": cpu_name(), "cpu_cores": os.cpu_count()},
        "versions": {"python": platform.python_version()} | {name: installed(name) for name in PACKAGES},
        "size": asdict(size), "training": asdict(training), "arms": [asdict(arm) for arm in chosen], "regimes": where,
        "seeds": list(range(seeds)), "tuning_seed": tuning_seed, "lrs": rates, "workers": workers,
        "tuning": [], "left_out": left_out,
    }  # fmt: skip
    limit = began + deadline if deadline else float("inf")
    with pool(workers) as executor:
        pairs = [(regime, arm) for regime in where for arm in chosen]
        best = {(regime, arm.name): rates[0] for regime, arm in pairs}
        if len(rates) > 1:
            tuning = [(arm, size, training, regime, tuning_seed, lr) for regime, arm in pairs for lr in rates]
            page["tuning"] = run_all(executor, tuning, limit, left_out)
            best = best_rates(page["tuning"])
        tasks: list[Task] = [
            (arm, size, training, regime, seed, best[regime, arm.name])
            for seed in range(seeds) for regime, arm in pairs if (regime, arm.name) in best
        ]  # fmt: skip
        page["runs"] = run_all(executor, tasks, limit, left_out)
    page["seconds"] = round(time.monotonic() - began, 1)
    finish(page, out)
    raise SystemExit(INCOMPLETE if any("--deadline" in item["reason"] for item in left_out) else 0)


def pick(text: str, known: dict[str, Any], option: str) -> list[Any]:
    """Return the named values of ``known`` in its order, or all if ``text`` names none.

    Raises:
        ValueError: a name is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()] or list(known)
    wrong = [name for name in names if name not in known]
    if wrong:
        raise ValueError(f"{option} {wrong[0]!r} is unknown: choose from {', '.join(known)}")
    return [value for name, value in known.items() if name in names]


def learning_rates(text: str) -> list[float]:
    """Parse the grid of learning rates, in ascending order.

    Raises:
        ValueError: the text is not positive numbers separated by commas.
    """
    try:
        rates = sorted({float(item) for item in text.split(",") if item.strip()})
    except ValueError:
        rates = []
    if not rates or rates[0] <= 0:
        raise ValueError(f"--lrs {text!r}: expected positive numbers separated by commas")
    return rates


def usable(arms: Sequence[Arm], size: ProblemSize, training: Training) -> tuple[list[Arm], list[dict[str, str]]]:
    """Return (arms that this version can run, other arms with the reason)."""
    found, left_out = [], []
    for arm in arms:
        try:
            method_config(arm, size, training)
        except ValueError as error:
            left_out.append({"arm": arm.name, "reason": str(error)})
        else:
            found.append(arm)
    return found, left_out


def pool(workers: int) -> ProcessPoolExecutor:
    """Make worker processes with one thread each.

    They are forked, because a new interpreter would not find this package when the script is run by path.
    """
    return ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), one_thread)


def one_thread() -> None:
    torch.set_num_threads(1)


def run_one(task: Task, limit: float) -> dict[str, Any] | None:
    """Train one student. Return None if the time limit has passed."""
    return None if time.monotonic() > limit else train(*task)


def run_all(
    executor: ProcessPoolExecutor, tasks: Sequence[Task], limit: float, left_out: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """Return results in the order of the tasks. Tasks that did not start before ``limit`` are added to ``left_out``."""
    futures = [executor.submit(run_one, task, limit) for task in tasks]
    for number, future in enumerate(as_completed(futures), 1):
        result = future.result()
        if result is not None:
            outcome = result["error"] if result["loss"] is None else f"loss {result['loss']:.4g}"
            print(
                f"[{number}/{len(tasks)}] {result['regime']} seed {result['seed']} lr {result['lr']:g} "
                f"{result['arm']}: {outcome}, {result['seconds']:.0f} s", file=sys.stderr, flush=True,
            )  # fmt: skip
    results = []
    for future, (arm, _, _, regime, seed, lr) in zip(futures, tasks, strict=True):
        if (result := future.result()) is None:
            left_out.append({"arm": arm.name, "reason": f"{regime}, seed {seed}, lr {lr:g}: no time left (--deadline)"})
        else:
            results.append(result)
    return results


def finish(page: dict[str, Any], out: Path) -> None:
    """Write the record and print its tables and findings."""
    import json

    rows = summarise(page["runs"], page["lrs"])
    page["rows"] = [row.to_dict() for row in rows]
    methods = list(dict.fromkeys(arm["method"] for arm in page["arms"]))
    folder = record.new_folder(
        out, "planted-rank", methods, record.hardware_name(page["hardware"], 0), datetime.date.today()
    )
    pictures = draw(page, rows, folder)
    (folder / "result.json").write_text(record.without_places(json.dumps(page, indent=1)) + "\n")
    (folder / "README.md").write_text(record.without_places(readme(page, rows, pictures)))
    show_tables(page, rows)
    print(f"record: {folder}", file=sys.stderr)


def show_tables(page: dict[str, Any], rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    for regime in page["regimes"]:
        own = [row for row in rows if row.regime == regime]
        table = Table(title=f"{regime}, {len(page['seeds'])} seeds")
        for column in COLUMNS:
            table.add_column(column, justify="left" if column == "student" else "right")
        for row in own:
            table.add_row(*table_row(row))
        Console(width=max(180, Console().width)).print(table)
        for line in findings(own, sum(page["size"]["planted"])) if own else []:
            print(f"- {line}")
    for item in page["left_out"]:
        print(f"not in the tables: {item['arm']}: {item['reason']}")


if __name__ == "__main__":
    typer.run(main)
