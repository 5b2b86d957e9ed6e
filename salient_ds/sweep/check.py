"""Checks every arm of a sweep before anything starts, with the checks that ``salient-ds check`` makes of one run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from salient_ds.check.memory import GIB
from salient_ds.check.preflight import preflight
from salient_ds.config.run import RunConfig, parse_config
from salient_ds.strict import ConfigError
from salient_ds.sweep.arms import job_run
from salient_ds.sweep.folder import SweepFolder
from salient_ds.sweep.spec import SweepSpec

SIZES = ("total_steps", "trainable_end", "target_total", "checkpoint_bytes")
"""Facts of the check that are kept for every arm."""
_SAME = ("max_steps", "epochs", "global_batch_size", "precision", "lr_schedule", "lr_warmup")
"""Keys of section ``train`` in which arms that share a budget agree."""


@dataclass
class SweepCheck:
    """What the check found."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Arm -> those of :data:`SIZES` that are known."""


def check_sweep(spec: SweepSpec, runs: Mapping[str, Mapping[str, Any]], folder: SweepFolder) -> SweepCheck:
    """Check all arms. Nothing is written and no torch is imported.

    Rows of data are rendered once for all arms with the same data and model.

    Args:
        runs: arm -> sections of its run file (:func:`salient_ds.sweep.arms.arm_runs`).
    """
    found, configs = SweepCheck(problems=folder.problems()), {}
    seen: set[str] = set()
    for name, run in runs.items():
        data = json.dumps([run.get("data"), run.get("model")], sort_keys=True, default=str)
        nowhere = folder.path / "runs" / name / "unused"  # runs of other processes may be at work in real directories
        try:
            config = parse_config(job_run(run, spec.rates(name)[0], spec.seeds.tune[0], nowhere))
        except ConfigError as error:
            found.problems += [f"arm {name!r}: {problem}" for problem in error.problems]
            continue
        configs[name] = config
        report = preflight(config, 1, quick=data in seen, run_source=spec.run)
        if not report.problems:
            seen.add(data)
        found.problems += [f"arm {name!r}: {problem}" for problem in report.problems + _held_out(config)]
        found.notes += [f"arm {name!r}: {note}" for note in report.notes]
        found.facts[name] = {key: report.facts[key] for key in SIZES if key in report.facts}
    found.notes = _merged(found.notes)
    found.notes += _budget_notes(configs, found.facts)
    if not found.problems:
        found.problems += _disk(spec, found.facts, folder)
    return found


def _held_out(config: RunConfig) -> list[str]:
    if config.data.eval is None and not config.data.eval_size:
        return ["no held-out data, so no learning rate can be chosen: set data.eval or data.eval_size"]
    return []


def _merged(notes: list[str]) -> list[str]:
    """Notes that several arms share, once, with the names of the arms."""
    arms: dict[str, list[str]] = {}
    for note in notes:
        arm, _, text = note.partition(": ")
        arms.setdefault(text, []).append(arm.removeprefix("arm "))
    return [f"arm{'s' if len(names) > 1 else ''} {', '.join(names)}: {text}" for text, names in arms.items()]


def _budget_notes(configs: Mapping[str, RunConfig], facts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Differences between arms that a comparison at one budget should not have, or should know of."""
    notes = []
    for key in _SAME:
        values = {name: getattr(config.train, key) for name, config in configs.items()}
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{name} {value}" for name, value in values.items())
            notes.append(f"the arms differ in train.{key} ({shown}): they do not have the same budget")
    sizes = {name: values["trainable_end"] for name, values in facts.items() if "trainable_end" in values}
    if sizes and max(sizes.values()) > 1.1 * min(sizes.values()):
        shown = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        notes.append(f"the arms differ in trainable parameters at the end ({shown})")
    return notes


def _disk(spec: SweepSpec, facts: Mapping[str, Mapping[str, Any]], folder: SweepFolder) -> list[str]:
    """Whether the last checkpoint of every run fits on the disk. Runs that are there already are counted again."""
    place = folder.path
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    needed = 0
    for name, values in facts.items():
        runs = len(spec.rates(name)) * len(spec.seeds.tune) + len(spec.seeds.fresh)
        needed += runs * values.get("checkpoint_bytes", 0)
    used = sum(path.stat().st_size for path in Path(folder.path / "runs").rglob("*") if path.is_file())
    if needed > free + used:
        return [
            f"output_dir needs about {needed / GIB:.1f} GiB for the last checkpoint of every run, but {place} has "
            f"{free / GIB:.1f} GiB free: free some, or take fewer learning rates or seeds"
        ]
    return []
