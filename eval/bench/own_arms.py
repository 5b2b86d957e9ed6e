"""The methods of salient_ds as arms, with its adapters and engine, and a shortened allocation schedule."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.config.run import RunConfig
from salient_ds.engine.build import build_engine, optimizer_factory, parameter_groups, rate_plan
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.engine.reports import MicroBatch
from salient_ds.engine.state import AllocationState
from salient_ds.heterolora.probe_events import ProbeEvents
from salient_ds.heterolora.probing import ProbingMethod
from salient_ds.methods.duties import FusingMethod
from salient_ds.methods.lora.options import LoRAConfig
from salient_ds.run.assemble import assemble
from salient_ds.zero.sharded_base import effective_config

from .method_settings import method_options, probe_data
from .models import ds_config, load_base, model_directory, run_config
from .plain_engine import PlainEngine
from .plan import PLAIN, ArmSpec
from .timing import Stopwatch, peak_gib, reset_peak, wait
from .traffic import Log

STEADY_STEPS = 10_000
"""Nominal number of steps of the run to which the timed steps belong."""


class TimedEngine:
    """Wraps an engine and times its three calls per step. Everything else is passed on to the engine."""

    def __init__(self, engine: Any, watch: Stopwatch) -> None:
        self._engine = engine
        self._watch = watch

    def __call__(self, **inputs: Tensor) -> Any:
        with self._watch.part("forward"):
            return self._engine(**inputs)

    def backward(self, loss: Tensor) -> None:
        with self._watch.part("backward"):
            self._engine.backward(loss)

    def step(self) -> None:
        with self._watch.part("step"):
            self._engine.step()
        if self._watch.mark_steps:
            wait(self._watch.device)
            self._watch.stepped_at = time.perf_counter()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@dataclass
class OwnArm:
    """A model with adapters in its engine, together with its current method."""

    spec: ArmSpec
    allocating: AllocatingEngine
    watch: Stopwatch

    @classmethod
    def build(cls, spec: ArmSpec, device: torch.device) -> OwnArm:
        with model_directory(spec.settings.config) as folder:
            run = run_config(spec, folder, method_options(spec, schedule=False))
            ds = effective_config(ds_config(spec, run, STEADY_STEPS), run, spec.gpus)
            base = load_base(run, ds, device)
        watch = Stopwatch(device)

        def make(adapted: AdaptedModel, settings: dict[str, Any], folding: bool) -> TimedEngine:
            return TimedEngine(
                make_engine(spec, adapted, run, settings, device, autocast=False, folding=folding), watch
            )

        batches = probe_data(spec, device) if run.method.probe_batches_of(1) else None
        allocating = assemble(base, run, ds, STEADY_STEPS, device, make_engine=make, probe_data=batches)
        return cls(spec, allocating, watch)

    @property
    def adapted(self) -> AdaptedModel:
        return self.allocating.adapted

    @property
    def engine(self) -> TimedEngine:
        found = self.allocating.engine
        assert isinstance(found, TimedEngine)
        return found

    def step(self, tokens_BS: Tensor) -> Any:
        """Run one optimizer step with the engine's own ``train_step``."""
        targets = tokens_BS.shape[0] * (tokens_BS.shape[1] - 1)
        batch = MicroBatch({"input_ids": tokens_BS, "labels": tokens_BS}, targets, ())
        return self.allocating.train_step([batch], targets * self.spec.gpus)

    def loss(self, tokens_BS: Tensor) -> float:
        return float(self.step(tokens_BS).loss)

    def facts(self) -> dict[str, Any]:
        return {"compacted": False, "total_rank": self.live_rows(), "rows": self.adapted.layout.total}

    def live_rows(self) -> int:
        return sum(int(adapter.rank_mask_R.sum()) for adapter in self.adapted.adapters.values())

    def run_schedule(self, tokens_BS: Tensor, log: Log | None = None) -> dict[str, Any]:
        """Train through a shortened allocation schedule. Return the time of every event and the final total rank.

        An event's ``seconds`` are the time from the end of the optimizer step to the end of the training step, less the
        time of a compaction. The device is idle at both ends. ``gather``, ``solve`` and ``apply`` are measured by the
        engine itself. An event that comes before its step (HeteroLoRA) takes the sum of the three. With ``log`` from
        :func:`.traffic.counted`, ``sent`` is what the event's step sent.
        """
        spec, device = self.spec, self.watch.device
        run = run_config(spec, "unused", method_options(spec, schedule=True))
        layout, steps = self.adapted.layout, spec.settings.schedule_steps
        method = run.method.build(layout, steps, rate_plan(run.train, steps))
        probes = isinstance(method, ProbingMethod)
        planned = method.searches if isinstance(method, ProbingMethod) else method.events
        if not planned or not (probes or run.method.grows or spec.settings.target_rank < spec.rank):
            return {}
        steady = self.allocating
        if isinstance(method, FusingMethod):
            method.fused = run.speed.fused_statistics
        steady.state.method = LoRAConfig().build(layout, STEADY_STEPS)  # the timed steps' method stops observing
        state = AllocationState(steady.engine, steady.adapted, method, device)
        before = ProbeEvents(state, probe_data(spec, device)) if probes else None
        self.allocating = AllocatingEngine(state, resizer=steady.resizer, before=before)
        self.watch.mark_steps = True
        del steady  # its hooks and views would keep tensors alive that a compaction replaces
        reset_peak(device)
        events: list[dict[str, Any]] = []
        after: list[float] = []
        for _ in range(spec.settings.schedule_steps):
            wait(device)
            if log is not None:
                log.clear()
            began = time.perf_counter()
            report = self.step(tokens_BS)
            wait(device)
            ended = time.perf_counter()
            if report.event is not None:
                found = report.event
                after_step = ended - self.watch.stepped_at - (report.compaction or 0.0)
                took = found.gather + found.solve + found.apply if probes else after_step
                sent = {} if log is None else {"sent": list(log)}
                events.append(event_row(found, took) | {"compaction": report.compaction} | sent)
                after.clear()
            else:
                after.append(ended - began)
        self.allocating.finish()
        self.watch.mark_steps = False
        target = planned[-1].total_rank
        left = self.live_rows()
        return {
            "event_seconds": [event["seconds"] for event in events],
            "events": events,
            "target_total_rank": target,
            "final_total_rank": left,
            "exact": left == target == self.allocating.decisions.latest.total,
            "seconds_after_events": median(after) if after else None,
            "peak_gib_schedule": peak_gib(device),
        }


def event_row(report: Any, seconds: float) -> dict[str, Any]:
    return {
        "step": report.event.step, "window": report.event.window, "budget": report.event.total_rank,
        "kept": report.decision.total, "seconds": seconds, "gather": report.gather, "solve": report.solve,
        "apply": report.apply,
    }  # fmt: skip


def make_engine(
    spec: ArmSpec,
    adapted: AdaptedModel,
    run: RunConfig,
    ds: dict[str, Any],
    device: torch.device,
    *,
    autocast: bool,
    folding: bool = False,
) -> Any:
    """Build the plain loop, or DeepSpeed's engine exactly as salient_ds builds it for a run."""
    ratio = run.sigma_ratio(adapted.layout)
    if spec.loop != PLAIN:
        flat = run.speed.flat_gradients
        return build_engine(
            adapted, run.train, ds, STEADY_STEPS, device, folding, sigma_ratio=ratio, flat_gradients=flat
        )
    optimizer = optimizer_factory(run.train, fused=device.type == "cuda")
    groups = [
        {k: v for k, v in g.items() if k != "name"}
        for g in parameter_groups(adapted, run.train.lr, run.train.weight_decay, ratio)
    ]
    return PlainEngine(adapted.trained, groups, optimizer, spec.settings.clip, autocast)
