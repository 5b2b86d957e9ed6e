"""What a sweep found: sweep.json, results.csv, report.html. Written again whenever the sweep is looked at. No torch."""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import salient_ds
from salient_ds.sweep.folder import SweepFolder, write_whole
from salient_ds.sweep.plan import ArmPlan, Job, Outcome, expected_runs, plan
from salient_ds.sweep.spec import SweepSpec, lr_text
from salient_ds.sweep.statistics import Difference, paired, spread, with_holm

COLUMNS = ("arm", "lr", "seed", "phase", "status", "steps", "train_loss", "trainable", "total_rank", "seconds",
           "start_step", "peak_allocated", "peak_reserved", "host", "version", "reason")  # fmt: skip
"""Columns of results.csv besides the held-out metrics, which stand between ``train_loss`` and ``trainable``."""


def collect(spec: SweepSpec, folder: SweepFolder, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Everything that the sweep knows by now, as plain values.

    Args:
        runs: arm -> sections of its run file.
    """
    outcomes = folder.outcomes()
    plans = plan(spec, outcomes)
    planned = {job.key for state in plans.values() for job in state.jobs}
    ended = [outcomes[key] for key in planned & outcomes.keys()]
    arms = [_arm(spec, state, outcomes, runs[name]) for name, state in plans.items()]
    failures = [_failure(folder, o) for o in ended if o.status == "failed" or _diverged_afresh(o)]
    return {
        "spec": spec.model_dump(mode="json"),
        "metric": spec.metric.model_dump(mode="json"),
        "baseline": spec.compared_with,
        "fresh_eval": spec.fresh_eval,
        "arms": arms,
        "comparisons": [item.to_json() for item in compare(spec, plans, outcomes)],
        "failed": sorted(failures, key=lambda item: item["run"]),
        "runs": {"ended": len(ended), "expected": expected_runs(spec, plans)},
        "complete": all(state.complete for state in plans.values()) and len(ended) == len(planned),
        "left_out": sorted(outcomes.keys() - planned),
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": salient_ds.__version__,
    }


def _diverged_afresh(outcome: Outcome) -> bool:
    """Whether a run diverged that should not have: at the learning rate that was chosen."""
    return outcome.phase == "fresh" and outcome.status != "finished"


def _failure(folder: SweepFolder, outcome: Outcome) -> dict[str, Any]:
    job = Job(outcome.arm, outcome.lr, outcome.seed, outcome.phase)
    return {
        "run": str(folder.run_directory(job).relative_to(folder.path)), "status": outcome.status,
        "reason": outcome.reason, "log": str(folder.log_file(job)), "log_tail": folder.log_tail(job),
    }  # fmt: skip


def fresh_values(spec: SweepSpec, state: ArmPlan, outcomes: Mapping[str, Outcome]) -> dict[int, float]:
    """Seed -> held-out metric of the arm's finished runs on fresh seeds."""
    found = (outcomes.get(job.key) for job in state.jobs if job.phase == "fresh")
    return {o.seed: o.metrics[spec.metric.name] for o in found if o is not None and o.status == "finished"}


def compare(spec: SweepSpec, plans: Mapping[str, ArmPlan], outcomes: Mapping[str, Outcome]) -> list[Difference]:
    """Every arm minus the baseline on the fresh seeds that both have finished."""
    base = spec.compared_with
    others = fresh_values(spec, plans[base], outcomes)
    found = [
        paired(name, base, fresh_values(spec, state, outcomes), others, spec.metric.sign)
        for name, state in plans.items()
        if name != base
    ]
    return with_holm([item for item in found if item is not None])


def _arm(spec: SweepSpec, state: ArmPlan, outcomes: Mapping[str, Outcome], run: Mapping[str, Any]) -> dict[str, Any]:
    given = set(spec.rates(state.arm))
    fresh = [outcomes[job.key] for job in state.jobs if job.phase == "fresh" and job.key in outcomes]
    done = [outcome for outcome in fresh if outcome.status == "finished"]
    values = fresh_values(spec, state, outcomes)
    summary = spread(list(values.values()))
    return {
        "name": state.arm,
        "overrides": spec.arms[state.arm].overrides,
        "method": dict(run.get("method") or {}),
        "lr": state.chosen,
        "edge": state.edge,
        "close": close_rates(state, len(spec.seeds.tune), None if summary is None else summary.deviation),
        "tuning": [_rate(spec, state, lr, lr not in given, outcomes) for lr in state.scores],
        "fresh": None if summary is None else asdict(summary) | {"values": {str(s): v for s, v in values.items()}},
        "trainable": _typical([outcome.trainable for outcome in done]),
        "total_rank": _typical([outcome.total_rank for outcome in done]),
        "seconds": _typical([outcome.seconds for outcome in done if outcome.start_step == 0]),
        "peak_allocated": _typical([outcome.peak_allocated for outcome in done]),
        "peak_reserved": _typical([outcome.peak_reserved for outcome in done]),
    }


def close_rates(state: ArmPlan, tuning_seeds: int, deviation: float | None) -> list[float]:
    """Learning rates that the tuning seeds do not tell apart from the chosen one.

    A rate is close if its score is worse by less than the standard error of a mean over the tuning seeds. How much runs
    of one rate differ is known from the fresh seeds. Example: 0.9822 at 0.008, 0.9827 at 0.004, one tuning seed, and
    fresh seeds that deviate by 0.003: five fresh seeds at 0.004 were better by 0.007.

    Args:
        deviation: standard deviation of the fresh seeds; None: unknown, and no rate is close.
    """
    if state.chosen is None or deviation is None:
        return []
    best, bound = state.scores[state.chosen], deviation / tuning_seeds**0.5
    scores = [(lr, score) for lr, score in state.scores.items() if lr != state.chosen and score is not None]
    return [lr for lr, score in scores if best is not None and score - best < bound]


def _rate(spec: SweepSpec, state: ArmPlan, lr: float, added: bool, outcomes: Mapping[str, Outcome]) -> dict[str, Any]:
    """One learning rate of an arm on the tuning seeds."""
    found = [outcomes.get(f"{state.arm}~lr-{lr_text(lr)}~seed-{seed}") for seed in spec.seeds.tune]
    score = state.scores[lr]
    value = None if score is None or score in (float("inf"), float("-inf")) else spec.metric.sign * score
    return {
        "lr": lr, "added": added, "value": value,
        "status": sorted({"waiting" if outcome is None else outcome.status for outcome in found}),
    }  # fmt: skip


def _typical(values: list[Any]) -> float | int | None:
    """The median of the known values (the higher one of two in the middle); None if there are none."""
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def table(spec: SweepSpec, outcomes: Mapping[str, Outcome]) -> str:
    """results.csv: one line per run that ended. Empty cells are unknown."""
    rows = sorted(outcomes.values(), key=lambda o: (o.arm, o.phase == "fresh", o.lr, o.seed))
    metrics = sorted({name for row in rows for name in row.metrics} | {spec.metric.name})
    place = COLUMNS.index("trainable")
    columns = [*COLUMNS[:place], *(f"eval_{name}" for name in metrics), *COLUMNS[place:]]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        plain = row.to_json()
        writer.writerow(
            {c: plain[c] for c in COLUMNS} | {f"eval_{name}": plain["metrics"].get(name) for name in metrics}
        )
    return out.getvalue()


def write_report(spec: SweepSpec, folder: SweepFolder, runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write sweep.json, results.csv and report.html, each all or nothing, and return what sweep.json holds."""
    from salient_ds.sweep.page import to_html

    found = collect(spec, folder, runs)
    write_whole(folder.path / "sweep.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    write_whole(folder.path / "results.csv", table(spec, folder.outcomes()))
    write_whole(folder.path / "report.html", to_html(found))
    return found
