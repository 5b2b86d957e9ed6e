"""``salient-ds sweep``: checks a sweep, leads its workers, shows how far they are and reports. No torch."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from salient_ds.run.exits import RUN_ERROR, USAGE_ERROR, print_problems
from salient_ds.strict import ConfigError
from salient_ds.sweep.arms import arm_runs, fingerprint, fresh_data
from salient_ds.sweep.check import check_sweep
from salient_ds.sweep.folder import SweepFolder
from salient_ds.sweep.machine import Crew, places
from salient_ds.sweep.plan import expected_runs, plan, waiting
from salient_ds.sweep.printing import Line, print_plan, print_result
from salient_ds.sweep.report import write_report
from salient_ds.sweep.spec import SweepSpec, load_spec
from salient_ds.sweep.worker import INTERRUPTED, POLL, run_worker

Runs = Mapping[str, Mapping[str, Any]]


def sweep(path: str, *, dry_run: bool, jobs: int | None, worker: bool, overwrite: bool) -> int:
    """Body of the command.

    Args:
        dry_run: print the plan and start nothing.
        jobs: processes on this machine; None: as the sweep file says.
        worker: be one more process of a sweep that is led elsewhere.
        overwrite: delete the runs of arms that have changed.

    Returns:
        The exit status: 0 if every run ended well, 1 if one failed or the check found problems, 130 after Ctrl-C.
    """
    wrong = [flag for flag, on in (("--dry-run", dry_run), ("--overwrite", overwrite), ("--jobs", jobs is not None))
             if on and worker]  # fmt: skip
    if wrong:
        print_problems([f"{wrong[0]} does nothing with --worker, one process of a sweep: leave one of them out"])
        return USAGE_ERROR
    spec_path = Path(path)
    try:
        spec = load_spec(spec_path)
        if worker:
            return run_worker(spec, spec_path)
        folder = SweepFolder(Path(spec.output_dir))
        runs = arm_runs(spec, spec_path)
        found = check_sweep(spec, runs, folder)
        held_out = fresh_data(spec, spec_path)
        prints = {name: fingerprint(run, held_out) for name, run in runs.items()}
        problems = found.problems or _changed(folder, prints, overwrite)
        if problems:
            raise ConfigError(problems)
        print_plan(spec, folder, spec_path, runs, found, _again(spec), commands=dry_run)
        if dry_run:
            return 0
        with folder.lock():
            return _lead(spec, spec_path, folder, runs, prints, jobs)
    except OSError as error:
        print_problems([f"cannot use {error.filename or 'a file'}: {error.strerror or error}"])
        return RUN_ERROR
    except ConfigError as error:
        print_problems(error.problems)
        count = len(error.problems)
        print(f"{path}: {count} problem{'s' if count > 1 else ''}, nothing was started", file=sys.stderr)
        return RUN_ERROR


def _changed(folder: SweepFolder, prints: Runs, overwrite: bool) -> list[str]:
    """Arms whose earlier runs cannot stand beside new ones, one sentence each. ``prints``: fingerprints by arm."""
    changed = folder.changed_arms(prints)
    return [] if overwrite else [
        f"arm {name!r} was run with other settings ({'; '.join(lines[:4])}{'; ...' if len(lines) > 4 else ''}): set "
        "them back, rename the arm, choose another output_dir, or delete its runs with --overwrite"
        for name, lines in changed.items()
    ]  # fmt: skip


def _again(spec: SweepSpec) -> set[str]:
    """Statuses of earlier runs that are tried again: failed ones, and stopped ones once ``stop`` is gone."""
    return {"failed"} if spec.stop is not None else {"failed", "stopped"}


def _lead(spec: SweepSpec, spec_path: Path, folder: SweepFolder, runs: Runs, prints: Runs, jobs: int | None) -> int:
    """Start the workers and wait for every run."""
    here = places(spec, jobs)
    folder.begin(prints, replaced=folder.changed_arms(prints), again=_again(spec))
    crew = Crew(spec_path, here, folder.path / "queue" / "workers.log")
    stop = _Stop()
    with stop, Line() as line:
        if here.jobs == 0:
            line.message(f"waiting for processes of salient-ds sweep {spec_path} --worker")
        try:
            crew.start(_at_once(spec, folder))
            left = _follow(spec, folder, crew, line, stop)
        finally:
            if stop.asked:
                line.message("stopping: workers save a checkpoint and end (Ctrl-C again: at once)")
            crew.stop() if stop.asked < 2 else crew.kill()
    result = write_report(spec, folder, runs)
    print_result(result, folder, (crew.log_tail() or ["they said nothing"]) if left else [])
    if stop.asked:
        print(f"stopped: salient-ds sweep {spec_path} continues", file=sys.stderr)
        return INTERRUPTED
    return 0 if result["complete"] and not result["failed"] and not left else RUN_ERROR


def _at_once(spec: SweepSpec, folder: SweepFolder) -> int:
    """How many runs could ever be at work at the same time."""
    outcomes = folder.outcomes()
    plans = plan(spec, outcomes)
    return max(len(waiting(plans, outcomes)), expected_runs(spec, plans) - len(outcomes), 0)


def _follow(spec: SweepSpec, folder: SweepFolder, crew: Crew, line: Line, stop: _Stop) -> bool:
    """Wait until every run has ended. Returns whether runs are left because the workers are gone."""
    while not stop.asked:
        outcomes = folder.outcomes()
        plans = plan(spec, outcomes)
        left = waiting(plans, outcomes)
        line.show(spec, plans, outcomes)
        if not left and all(state.complete for state in plans.values()):
            return False
        if not crew.look(len(outcomes)):
            queue = folder.queue()
            if not any(queue.owner_alive(job.key) for job in left):  # else workers of other hosts go on
                return True
        time.sleep(POLL)
    return False


class _Stop:
    """Counts SIGINT and SIGTERM while it is entered. The second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked += 1
        if self.asked > 1:
            raise KeyboardInterrupt

    def __enter__(self) -> _Stop:
        self._before = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
