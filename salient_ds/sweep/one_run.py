"""One run of a sweep in this process: the package's own training, followed from outside. Needs torch.

Runs share a process, so that imports, the CUDA context and the tokenised data are paid for once. A run leaves nothing
behind that the next one could see: the engine is taken off its hooks, memory is freed, and the process group, which is
the same for all, has one member. :func:`leaves_traces` names the runs for which this cannot be had; after one of them
the worker begins a fresh process.
"""

from __future__ import annotations

import gc
import json
import math
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import salient_ds
from salient_ds.config.run import RunConfig
from salient_ds.engine.reports import Diverged, StepReport
from salient_ds.engine.shard_files import CheckpointError
from salient_ds.monitor.metrics import read_metrics
from salient_ds.own_files import read_object, reading
from salient_ds.run.inputs import Inputs, load_inputs
from salient_ds.run.resuming import choose_start
from salient_ds.run.training import Training
from salient_ds.sweep.plan import Job, Outcome
from salient_ds.sweep.spec import Metric
from salient_ds.sweep.stopping import HopelessRun, Watch
from salient_ds.zero.ds_json import load_ds_config
from salient_ds.zero.internals.engine_state import retire

PREFIX = "eval_"
"""What held-out numbers begin with in a run's metrics.jsonl."""


class Interrupted(Exception):
    """The worker has to stop. The run has saved a checkpoint, if it had taken a step."""


class LeaseLost(Exception):
    """Another process has taken the run over."""


def leaves_traces(config: RunConfig, device: torch.device) -> bool:
    """Whether a run changes its process for those that come after it.

    Compiled layers stay in torch's caches and settings, liger's kernels in transformers' modules, and DeepSpeed's
    ZeRO-3 keeps state of its own.
    """
    compiled = config.speed.compile_layers
    stage = (load_ds_config(config.deepspeed).get("zero_optimization") or {}).get("stage", 0)
    return (
        compiled is True or (compiled == "auto" and device.type == "cuda") or config.speed.liger != "none" or stage == 3
    )


class DataCache:
    """Reads the data of a run, and keeps the last few for runs with the same settings."""

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self._kept: dict[str, Inputs] = {}

    def __call__(self, config: RunConfig, tokenizer: Any) -> Inputs:
        seed = config.train.seed if config.data.eval is None and config.data.eval_size else None
        named = [*(one.path for one in config.data.sets), config.data.eval]
        files = [(Path(p).stat().st_mtime_ns, Path(p).stat().st_size) for p in named if p and Path(p).is_file()]
        parts = [config.data.model_dump(mode="json"), config.model.model_dump(mode="json"), seed, files]
        key = json.dumps(parts, sort_keys=True)
        if key not in self._kept:
            while len(self._kept) >= self.size:
                self._kept.pop(next(iter(self._kept)))
            self._kept[key] = load_inputs(config, tokenizer)
        return self._kept[key]


def run_job(
    job: Job,
    config: RunConfig,
    metric: Metric,
    device: torch.device,
    *,
    read_inputs: Callable[[RunConfig, Any], Inputs],
    watch: Callable[[int], Watch] | None,
    interrupted: Callable[[], bool],
    lost: Callable[[], bool],
) -> Outcome:
    """Train one run to its end, or continue it, and say how it ended.

    Args:
        watch: makes the early stop of a run with so many steps; None: it is never stopped early.
        interrupted: whether this process should stop.
        lost: whether another process has taken the run over.

    Raises:
        Interrupted, LeaseLost: the run has not ended.
    """
    watching: Watch | None = None

    def after_step(training: Training, report: StepReport) -> None:
        nonlocal watching
        step = training.engine.step
        if lost():
            raise LeaseLost(f"another process took {job.key} over at step {step}")
        if watch is not None:
            watching = watching or watch(training.total_steps)
            watching.look(step, report.loss)
        if interrupted() and step < training.total_steps:
            training.save()
            raise Interrupted(f"stopped after step {step}")

    began = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    known: dict[str, Any] = {"host": socket.gethostname(), "version": salient_ds.__version__}
    training = Training(config, device, read_inputs=read_inputs, after_step=after_step)
    try:
        _train(training)
        known |= {"status": "finished"} | _numbers(training, metric)
        if not math.isfinite(known["metrics"][metric.name]):
            known |= {"status": "diverged", "reason": f"the held-out {metric.name} is not finite"}
    except HopelessRun as error:
        known |= {"status": "stopped", "reason": str(error), "steps": training.engine.step}
    except Diverged as error:
        known |= {"status": "diverged", "reason": str(error).partition(";")[0], "steps": training.engine.step}
    finally:
        known |= _memory(device)
        _tidy_up(training, whole=not leaves_traces(config, device))
    return Outcome(job.arm, job.lr, job.seed, job.phase, seconds=time.perf_counter() - began, **known)


def _train(training: Training) -> None:
    """Continue the run from its last whole checkpoint. If there is none that fits, begin it again."""
    checkpoints = Path(training.config.output_dir) / "checkpoints"
    try:
        choose_start(checkpoints, "auto", lambda _: None)
        training.run("auto", overwrite=False)
        return
    except CheckpointError as error:
        if hasattr(training, "engine"):  # it trained: the error is no old checkpoint's
            raise
        reason = str(error)
    training.say(f"begun again: {reason}")
    _release(training)
    training.run("never", overwrite=True)


def _release(training: Training) -> None:
    """Unlock the run directory."""
    directory = getattr(training, "directory", None)
    if directory is not None:
        directory.close()


def _numbers(training: Training, metric: Metric) -> dict[str, Any]:
    """What a finished run has left in its directory, and in memory if it trained here.

    Raises:
        ValueError: the run did not log the metric after its last step.
    """
    directory = training.directory
    summary = read_object(directory.summary)
    with reading(directory.summary):
        found = {"steps": summary["total_steps"], "train_loss": summary["smoothed_loss"],
                 "total_rank": summary["total_rank"], "start_step": summary["start_step"]}  # fmt: skip
    last = found["steps"]
    metrics: dict[str, float] = {}
    for row in read_metrics(directory.metrics):
        if row["step"] == last:
            metrics |= {k.removeprefix(PREFIX): float(v) for k, v in row.items() if k.startswith(PREFIX)}
    if metric.name not in metrics:
        raise ValueError(
            f"{directory.metrics} holds no {PREFIX}{metric.name} at step {last}, only "
            f"{', '.join(PREFIX + name for name in metrics) or 'no held-out number'}: choose another metric"
        )
    found["metrics"] = metrics
    engine = getattr(training, "engine", None)
    if engine is not None:
        ranks = engine.decisions.latest.ranks(engine.adapted.layout)
        found["trainable"] = training.config.method.adapter_parameters(engine.initial_layout, ranks)
    return found


def _memory(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}
    allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {"peak_allocated": allocated, "peak_reserved": reserved}


def _tidy_up(training: Training, whole: bool) -> None:
    """Unlock the run's directory and free its memory. ``whole``: take its engine off all hooks, for the next run."""
    engine = getattr(training, "engine", None)
    if engine is not None:
        if whole:
            retire(engine.engine)
        del training.engine
    _release(training)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
