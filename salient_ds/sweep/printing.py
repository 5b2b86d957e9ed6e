"""What a sweep prints: its plan, a line of progress, the result. No torch."""

from __future__ import annotations

import math
import shlex
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from salient_ds.sweep.check import SweepCheck
from salient_ds.sweep.folder import SweepFolder
from salient_ds.sweep.plan import ArmPlan, Job, Outcome, expected_runs, plan, waiting
from salient_ds.sweep.spec import SweepSpec, lr_text


def print_plan(
    spec: SweepSpec,
    folder: SweepFolder,
    spec_path: Path,
    runs: Mapping[str, Any],
    found: SweepCheck,
    again: Collection[str],
    commands: bool,
) -> None:
    """Print how many runs there are and what is done already.

    Args:
        runs: arms by name.
        again: statuses of runs that will be tried again.
        commands: also print the command of every run that is known and not done.
    """
    outcomes = {key: outcome for key, outcome in folder.outcomes().items() if outcome.status not in again}
    plans = plan(spec, outcomes)
    for note in found.notes:
        print(f"note: {note}")
    for name in runs:
        facts, rates = found.facts.get(name, {}), spec.rates(name)
        steps = f"{facts['total_steps']} steps, " if "total_steps" in facts else ""
        size = f", {facts['trainable_end']:,} trainable parameters at the end" if "trainable_end" in facts else ""
        print(f"arm {name}: {steps}lr {', '.join(map(lr_text, rates))}{size}")
    tune = sum(len(spec.rates(name)) for name in spec.arms) * len(spec.seeds.tune)
    fresh = len(spec.arms) * len(spec.seeds.fresh)
    total = expected_runs(spec, plans)
    widened = total - tune - fresh
    most = 2 * spec.widen * len(spec.seeds.tune) * sum(len(spec.rates(name)) > 1 for name in spec.arms) - widened
    done = len({job.key for state in plans.values() for job in state.jobs} & outcomes.keys())
    more = f", at most {most} more if best rates lie at an edge" if most > 0 else ""
    extra = f" + {widened} at wider rates" if widened > 0 else ""
    print(f"{total} runs: {tune} to tune{extra} + {fresh} on fresh seeds{more}; {done} are done")
    if commands:
        for job in waiting(plans, outcomes):
            print(_command(folder.run_file(job)))
        for name, state in plans.items():
            if not state.complete:
                for seed in spec.seeds.fresh:
                    place = folder.run_file(Job(name, spec.rates(name)[0], seed, "fresh"))
                    chosen = place.parent.with_name("lr-CHOSEN") / place.name
                    print(_command(chosen))
        print(f"(run files are written when a run starts; salient-ds sweep {shlex.quote(str(spec_path))} starts them)")


def _command(run_file: Path) -> str:
    return f"salient-ds train {shlex.quote(str(run_file))} --gpus 1 --resume auto"


class Line:
    """One line of progress: rewritten in place on a terminal, else printed when a run has ended."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream if stream is not None else sys.stderr
        self._terminal = self.stream.isatty()
        self._last = ""

    def show(self, spec: SweepSpec, plans: Mapping[str, ArmPlan], outcomes: Mapping[str, Outcome]) -> None:
        """Show how far the sweep is, if that has changed."""
        text = progress(spec, plans, outcomes)
        if text != self._last:
            start, end = ("\r\x1b[2K", "") if self._terminal else ("", "\n")
            print(f"{start}{text}", end=end, file=self.stream, flush=True)
            self._last = text

    def message(self, text: str) -> None:
        """Print a line of its own."""
        print(f"\n{text}" if self._terminal else text, file=self.stream, flush=True)

    def __enter__(self) -> Line:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._terminal and self._last:
            print(file=self.stream, flush=True)


def progress(spec: SweepSpec, plans: Mapping[str, ArmPlan], outcomes: Mapping[str, Outcome]) -> str:
    """Runs done, those that did not finish, and the best value of every arm so far."""
    ended = [outcomes[job.key] for state in plans.values() for job in state.jobs if job.key in outcomes]
    counts = Counter(outcome.status for outcome in ended)
    ends = "".join(f", {counts[status]} {status}" for status in ("stopped", "diverged", "failed") if counts[status])
    return f"{len(ended)}/{expected_runs(spec, plans)} runs{ends}{_best(spec, ended)}"


def _best(spec: SweepSpec, ended: list[Outcome]) -> str:
    scored = [outcome for outcome in ended if math.isfinite(outcome.score(spec))]
    if not scored:
        return ""
    best = min(scored, key=lambda outcome: outcome.score(spec))
    value = best.metrics[spec.metric.name]
    return f"  best {spec.metric.name} {value:.4g}: {best.arm}, lr {lr_text(best.lr)}, seed {best.seed}"


def print_result(result: Mapping[str, Any], folder: SweepFolder, worker_lines: list[str]) -> None:
    """Print chosen rates, differences and failed runs.

    Args:
        result: what sweep.json holds.
        worker_lines: last words of workers that died with work left.
    """
    metric = result["metric"]["name"]
    for arm in result["arms"]:
        fresh = arm["fresh"]
        known = "no finished run on fresh seeds" if fresh is None else (
            f"median {fresh['median']:.4g} ({fresh['low']:.4g} to {fresh['high']:.4g}, n={fresh['n']})"
        )  # fmt: skip
        chosen = "no learning rate" if arm["lr"] is None else f"lr {lr_text(arm['lr'])} ({arm['edge']})"
        print(f"{arm['name']}: {chosen}, {metric} {known}")
        if arm["close"]:
            others = ", ".join(map(lr_text, arm["close"]))
            print(
                f"note: {arm['name']}: the tuning seeds do not tell {others} apart from {lr_text(arm['lr'])}, which "
                "may be the wrong choice by chance: give more of them (seeds.tune)"
            )
    for item in result["comparisons"]:
        interval = "" if item["low"] is None else f", 95 % {item['low']:+.3g} to {item['high']:+.3g}"
        holm = "" if item["p_holm"] is None else f", p (Holm) {item['p_holm']:.3g}"
        print(
            f"{item['arm']} - {item['baseline']}: {item['mean']:+.3g}{interval}, n={item['n']}{holm}: {item['verdict']}"
        )
    for item in result["failed"]:
        print(f"error: {item['run']} {item['status']}: {item['reason']}", file=sys.stderr)
        for text in item["log_tail"]:
            print(f"    {text}", file=sys.stderr)
        print(f"    log: {item['log']}", file=sys.stderr)
    if worker_lines:
        print("error: the workers ended with runs left; their last lines:", file=sys.stderr)
        for text in worker_lines:
            print(f"    {text}", file=sys.stderr)
    print(f"report: {folder.path / 'report.html'}")
