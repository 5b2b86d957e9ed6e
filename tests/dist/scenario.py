"""One small training run inside an already started process group, and what there is to know about it afterwards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from salient_ds.config.run import RunConfig, parse_config
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.engine.reports import MicroBatch
from salient_ds.heterolora.probe import ProbeData
from salient_ds.models.loading import load_model
from salient_ds.run.assemble import assemble
from salient_ds.zero.ds_json import resolve_ds_config
from salient_ds.zero.sharded_base import effective_config

GLOBAL_BATCH, TOTAL_STEPS, RANK = 4, 16, 5
SALIENT = {
    "name": "salientlora", "score": "salience", "target_rank": 2, "initial_warmup": 2, "final_warmup": 2,
    "window_initial": 3, "window_final": 5,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A way to run the same training."""

    stage: int
    precision: str = "fp32"
    zero: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=lambda: dict(SALIENT))
    train: dict[str, Any] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    ds: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(
        default_factory=lambda: {"zero3": "partitioned", "compaction": "none", "growth": "preallocated"}
    )

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return int(self.train.get("max_steps", TOTAL_STEPS))

    def config(self, model: Path) -> RunConfig:
        return parse_config({
            "output_dir": "unused", "deepspeed": "unused", "model": {"path": str(model)},
            "adapter": {"rank": RANK, "alpha": 8, "init_std": 0.1, "target_modules": ["q_proj", "v_proj", "down_proj"]}
            | self.adapter,
            "method": self.method,
            "data": {"train": "unused"},
            "speed": self.speed,
            "train": {"max_steps": TOTAL_STEPS, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 1, "lr": 0.02,
                      "precision": self.precision, "lr_schedule": "constant"} | self.train,
        })  # fmt: skip

    def ds_config(self, config: RunConfig, world_size: int) -> dict[str, Any]:
        zero = {"stage": self.stage, "reduce_bucket_size": 20000, "allgather_bucket_size": 20000} | self.zero
        raw = {"zero_optimization": zero, "steps_per_print": 10**9} | self.ds
        return resolve_ds_config(raw, config, world_size, self.steps)


def example(step: int, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels of one row of one global batch; rows differ in length and number of targets."""
    draw = torch.Generator().manual_seed(1000 * step + row)
    tokens = torch.randint(3, 190, (1, 6 + 3 * row), generator=draw)
    labels = tokens.clone()
    labels[:, : 2 + row] = -100
    return tokens, labels


def batches(step: int, global_rank: int, world_size: int) -> tuple[list[MicroBatch], int]:
    rows = range(global_rank * GLOBAL_BATCH // world_size, (global_rank + 1) * GLOBAL_BATCH // world_size)
    everything = sum(int((example(step, r)[1][:, 1:] != -100).sum()) for r in range(GLOBAL_BATCH))
    out = []
    for row in rows:
        tokens, labels = example(step, row)
        out.append(MicroBatch({"input_ids": tokens, "labels": labels}, int((labels[:, 1:] != -100).sum()), (row,)))
    return out, everything


def build(
    case: Case, model: Path, world_size: int, kept_N: torch.Tensor | None = None, probe_data: ProbeData | None = None
) -> AllocatingEngine:
    config = case.config(model)
    ds_config = effective_config(case.ds_config(config, world_size), config, world_size)
    base = load_model(config.model, config.train, ds_config)
    return assemble(base, config, ds_config, case.steps, torch.device("cpu"), kept_N=kept_N, probe_data=probe_data)


def advance(engine: AllocatingEngine, until: int, global_rank: int, world_size: int) -> tuple[list[float], list[Any]]:
    """Train up to step ``until``; task losses and decisions on the way."""
    losses, decisions = [], []
    while engine.step < until:
        report = engine.train_step(*batches(engine.step, global_rank, world_size))
        assert not report.skipped
        losses.append(report.loss)
        if report.event is not None:
            decisions.append(replace(report.event.decision, mask_N=report.event.kept_N))
    return losses, decisions


def local_state(engine: AllocatingEngine) -> dict[str, Any]:
    """Everything this process holds of the adapters: masters, copies and moments with their element ranges."""
    found = []
    for fragment in engine.shards.layout.fragments:
        part = engine.shards.part(fragment)
        assert part is not None
        entry = {"part": part, "master": engine.shards.master(fragment).clone()}
        entry |= {k: v.clone() for k, v in engine.shards.moments(fragment).items()}
        found.append(entry)
    low = []
    for owned in engine.shards.owned.values():
        place = owned.module, owned.factor, owned.address.shape
        low += [(*place, lo, copy.clone().float()) for copy, lo in engine.shards.copies(owned)]
    return {"fragments": found, "copies": low}


def run(global_rank: int, world_size: int, model: Path, cases: list[Case]) -> list[dict[str, Any]]:
    """Train every case from scratch in turn."""
    results = []
    for case in cases:
        engine = build(case, model, world_size)
        losses, decisions = advance(engine, case.steps, global_rank, world_size)
        engine.finish()
        results.append(
            {
                "losses": losses,
                "decisions": [(d.step, d.budget, d.mask_N.clone()) for d in decisions],
                "digests": [d.digest() for d in decisions],
                "ranks": decisions[-1].ranks(engine.initial_layout) if decisions else [],
                "state": local_state(engine),
                "layout": engine.initial_layout,
            }
        )
        engine.engine.destroy()
    return results
