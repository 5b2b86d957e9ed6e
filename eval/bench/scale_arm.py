"""What an arm sends, and how long a checkpoint holds it up: one process' part of scale.py."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from torch import Tensor

from salient_ds.engine.saving import Saver
from salient_ds.zero.collectives import all_succeeded, world

from .method_settings import method_options
from .models import run_config
from .own_arms import OwnArm
from .plan import ArmSpec
from .timing import wait
from .traffic import Log, as_traffic, sizes_of

SAVES = 3


def scale_facts(arm: Any, spec: ArmSpec, tokens_BS: Tensor, log: Log) -> dict[str, Any]:
    """Traffic of one step, counted and by formula, in bytes; for arms of this package also the stall of a checkpoint.

    Args:
        log: filled by :func:`.traffic.counted`, in whose block the arm was built.
    """
    log.clear()
    arm.step(tokens_BS)
    counted = as_traffic(log, spec.gpus)
    found: dict[str, Any] = {"step": asdict(counted)}
    if not isinstance(arm, OwnArm):
        return found
    run = run_config(spec, "unused", method_options(spec, schedule=False))
    base = sum(p.numel() for p in arm.adapted.model.parameters() if not p.requires_grad)
    work = sizes_of(run, arm.adapted.layout, base, spec.settings.config, spec.zero)
    return found | {"step_by_formula": asdict(work.step(1)), "stall": checkpoint_stall(arm, tokens_BS)}


def event_facts(arm: OwnArm, spec: ArmSpec, events: list[dict[str, Any]], usual: int) -> list[dict[str, Any]]:
    """Bytes that events sum, counted and by formula. Events with a compaction, which builds a new engine, are left out.

    Args:
        events: rows of :meth:`OwnArm.run_schedule` with ``sent``, the log of the event's step.
        usual: bytes that a step without an event sums.
    """
    run = run_config(spec, "unused", method_options(spec, schedule=True))
    layout = arm.allocating.initial_layout
    said = run.method.event_traffic(layout, run.method.adapter_parameters(layout))
    return [
        {"step": event["step"], "seconds": event["seconds"], "bytes_by_formula": said,
         "bytes": as_traffic(event["sent"], spec.gpus).summed - usual}
        for event in events
        if event["compaction"] is None
    ]  # fmt: skip


def checkpoint_stall(arm: OwnArm, tokens_BS: Tensor) -> float:
    """Seconds that a checkpoint adds to the step after it: the median of :data:`SAVES`, after a first one.

    The checkpoints are deleted.
    """
    device, state = arm.watch.device, arm.allocating.state
    folder = Path(tempfile.gettempdir(), f"salient-scale-{os.environ.get('MASTER_PORT', os.getpid())}")
    saver, stalls = Saver(folder, keep=1), []

    def step() -> float:
        began = time.perf_counter()
        arm.step(tokens_BS)
        wait(device)
        return time.perf_counter() - began

    usual = median(step() for _ in range(SAVES))
    for _ in range(SAVES + 1):
        wait(device)
        began = time.perf_counter()
        saver.start(state, {"bench": "scale"}, {}, None)
        step()
        stalls.append(time.perf_counter() - began - usual)
        saver.wait()
    if all_succeeded(True, device) and world().global_rank == 0:  # nobody writes any more
        shutil.rmtree(folder, ignore_errors=True)
    return median(stalls[1:])
