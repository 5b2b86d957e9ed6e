"""Whole runs on tasks with a metric, and evaluations of what they leave, inside started processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from salient_ds.config.run import parse_config
from salient_ds.run.evaluate import score, write
from salient_ds.run.same_everywhere import NodesDiffer
from salient_ds.run.targets import EvaluateOptions, target_of
from salient_ds.run.training import Training
from tests.support.tiny_heads import TARGETS

CPU = torch.device("cpu")
TASKS: dict[str, dict[str, Any]] = {
    "sequence-classification": {"kind": "classification", "columns": ["sentence"], "labels": ["no", "yes"],
                                "metrics": ["accuracy", "matthews"]},
    "regression": {"kind": "regression", "columns": ["sentence", "context"], "label_column": "number"},
    "question-answering": {"kind": "question-answering", "stride": 2, "id_column": "id"},
    "seq2seq-lm": {"kind": "summarisation", "source_column": "sentence", "max_target_length": 6, "num_beams": 2},
}  # fmt: skip


def settings(kind: str, task: str, base: Path, data: tuple[Path, Path], folder: Path, **train: Any) -> dict[str, Any]:
    """A run of six steps with an evaluation every two."""
    stage = train.pop("stage", 2)
    ds = folder.with_suffix(".json")
    ds.write_text(json.dumps({"zero_optimization": {"stage": stage, "reduce_bucket_size": 20000}}))
    eager = {"attn_implementation": "eager"} if kind == "deberta-v2" else {}
    return {
        "output_dir": str(folder), "deepspeed": str(ds), "model": {"path": str(base), "task": task, **eager},
        "adapter": {"rank": 3, "alpha": 8, "init_std": 0.1, "target_modules": TARGETS[kind]},
        "method": train.pop("method", {"name": "adalora", "target_rank": 2, "interval": 1, "final_warmup": 3}),
        "data": {"train": str(data[0]), "eval": str(data[1]), "max_length": 16, "task": TASKS[task]},
        "train": {"max_steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "lr": 0.05, "precision": "fp32",
                  "eval_every": 2, "best_metric": "auto", "keep_checkpoints": 1, **train},
    }  # fmt: skip


def run(global_rank: int, world_size: int, runs: dict[str, dict[str, Any]], resume: str = "never") -> dict[str, Any]:
    """Train every run to its end; what the last evaluations found."""
    found = {}
    for name, values in runs.items():
        training = Training(parse_config(values), CPU)
        training.run(resume, False)
        if training.start.nothing_to_do:
            found[name] = {"notes": training.start.notes}
        else:
            held_out = training.held_out
            assert held_out.outcome is not None and held_out.best is not None
            found[name] = {"values": held_out.outcome.values, "best": held_out.best.state(),
                           "step": training.engine.step}  # fmt: skip
            training.engine.engine.destroy()
        if training.directory._lock is not None:
            training.directory._lock.close()
    return found


def evaluate(
    global_rank: int, world_size: int, jobs: dict[str, tuple[str, dict[str, Any]]], folder: Path
) -> dict[str, Any]:
    """Score every target as ``salient-ds evaluate`` does."""
    found = {"differing": other_rows(global_rank, world_size, *next(iter(jobs.values())))}
    for name, (place, options) in jobs.items():
        chosen = EvaluateOptions(batch=3, **options)
        target = target_of(place, chosen)
        outcome, inputs, notes = score(target, chosen, CPU)
        if global_rank == 0:
            write(folder / name, {"scores": outcome.values}, outcome, inputs, True, ())
        found[name] = {"values": outcome.values, "notes": notes}
    return found


def other_rows(global_rank: int, world_size: int, place: str, options: dict[str, Any]) -> str:
    """What ``evaluate`` says if the last process reads fewer rows than the others."""
    fewer = options | ({"limit": 1} if global_rank == world_size - 1 else {})
    chosen = EvaluateOptions(batch=3, **fewer)
    try:
        score(target_of(place, chosen), chosen, CPU)
    except NodesDiffer as error:
        return str(error)
    return ""
