"""What every method of this package is asked to do in its arm: for the timed steps, and for a shortened schedule."""

from __future__ import annotations

from typing import Any

import torch

from salient_ds.adapters.options import LLAMA_MODULES
from salient_ds.adapters.targets import match_targets
from salient_ds.check.model_shapes import derived_linear_shapes
from salient_ds.engine.reports import MicroBatch
from salient_ds.heterolora.probe import ProbeData
from salient_ds.methods.table import methods

from .plan import ArmSpec

PROBE_BATCHES = 8
"""Batches that HeteroLoRA scores its modules on, at every event."""


def method_options(spec: ArmSpec, schedule: bool) -> dict[str, Any]:
    """Options of the arm's method.

    In both cases statistics are collected from the first step on, as in the middle of a real run.

    Args:
        schedule: use the shortened schedule. Otherwise windows are so long that no window ends in the timed steps, and
            methods without windows have an event every ``delta_t`` steps (AdaLoRA thus like PEFT's arm). IncreLoRA's
            and HeteroLoRA's events lie outside of the timed steps.
    """
    settings = spec.settings
    known = methods()[spec.arm].model_fields
    common = {"target_rank": min(settings.target_rank, spec.rank), **_windows(spec, schedule)}
    wanted = common | _OWN.get(spec.arm, _nothing)(spec, schedule)
    return {"name": spec.arm, **{key: value for key, value in wanted.items() if key in known}}


def _nothing(spec: ArmSpec, schedule: bool) -> dict[str, Any]:
    return {}


def _long(spec: ArmSpec) -> int:
    """More steps than are timed."""
    settings = spec.settings
    return max(200, 2 * (settings.warmup + settings.steps + settings.part_steps))


def _interval(spec: ArmSpec) -> int:
    """Steps between two events of the shortened schedule: six events or fewer."""
    return max(1, spec.settings.schedule_steps // 6)


def _windows(spec: ArmSpec, schedule: bool) -> dict[str, Any]:
    long = _long(spec)
    first, last = spec.settings.windows if schedule else (long, long)
    return {
        "window_initial": first,
        "window_final": last,
        "final_warmup": spec.settings.schedule_steps // 5 if schedule else 0,
        "interval": _interval(spec) if schedule else spec.settings.delta_t,
    }


def _increlora(spec: ArmSpec, schedule: bool) -> dict[str, Any]:
    """Growth up to the arm's rank. A quarter of the rows is in reserve, so that all rows compute in the timed steps.

    Every step scores all matrices. In the shortened schedule half of the matrices grow at each event.
    """
    reserve = max(1, spec.rank // 4)
    return {
        "target_rank": spec.rank,
        "start_rank": max(1, spec.rank - reserve),
        "add": reserve,
        "top_h": max(1, num_matrices(spec) // 2),
        "interval": _interval(spec) if schedule else _long(spec),
    }


def _heterolora(spec: ArmSpec, schedule: bool) -> dict[str, Any]:
    """The first event comes before the first step, which is not timed. A quarter of the modules is on from there."""
    interval = _interval(spec) if schedule else 100 * _long(spec)
    return {"interval_unit": "steps", "interval": interval, "probe_batches": PROBE_BATCHES}


def _adalora(spec: ArmSpec, schedule: bool) -> dict[str, Any]:
    """No warm-up, so that the events of the timed steps prune as PEFT's do with ``tinit=0``."""
    return {} if schedule else {"initial_warmup": 0}


_OWN = {"increlora": _increlora, "heterolora": _heterolora, "adalora": _adalora, "lora2": _adalora}
"""Options of single methods, by name: functions of the arm and of whether the schedule is the shortened one."""


def num_matrices(spec: ArmSpec) -> int:
    """Number of adapted matrices."""
    return len(match_targets(derived_linear_shapes(spec.settings.config), LLAMA_MODULES))


def probe_data(spec: ArmSpec, device: torch.device) -> ProbeData:
    """Batches of random tokens for methods that probe, each of the size of a training batch."""
    settings = spec.settings
    draw = torch.Generator().manual_seed(settings.seed + 1)
    shape = (PROBE_BATCHES, settings.batch, settings.seq)
    tokens = torch.randint(3, int(settings.config["vocab_size"]), shape, generator=draw).to(device)

    def batch(index: int) -> MicroBatch:
        found = tokens[index]
        return MicroBatch({"input_ids": found, "labels": found}, found.shape[0] * (found.shape[1] - 1), ())

    return ProbeData(PROBE_BATCHES, batch)
