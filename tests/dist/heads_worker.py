"""Heads and modules trained in full: train, stop, resume and export a cell of the matrix on tiny models."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from salient_ds.config.run import RunConfig, parse_config
from salient_ds.engine import checkpoint
from salient_ds.engine.engine import AllocatingEngine
from salient_ds.engine.reports import MicroBatch
from salient_ds.heterolora.probe import ProbeData
from salient_ds.models.heads import head_facts
from salient_ds.models.loading import load_base
from salient_ds.run.assemble import assemble
from salient_ds.run.export import export_run
from salient_ds.zero.ds_json import resolve_ds_config
from salient_ds.zero.sharded_base import effective_config
from tests.support.tiny_heads import GLOBAL_BATCH, TARGETS, example, targets
from tests.support.verify import logits_of

STEPS, STOP = 6, 3
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "adalora": {"name": "adalora", "target_rank": 2, "interval": 2, "final_warmup": 1},
    "lora2": {"name": "lora2", "target_rank": 2, "inner_width": 2, "interval": 2, "final_warmup": 1},
    "salientlora": {"name": "salientlora", "target_rank": 1, "initial_warmup": 0, "final_warmup": 1,
                    "window_initial": 2, "window_final": 2},
    "increlora": {"name": "increlora", "target_rank": 2, "top_h": 4, "interval": 2, "initial_warmup": 0},
    "heterolora": {"name": "heterolora", "keep": 0.5, "interval": 2, "interval_unit": "steps", "probe_batches": 1},
}  # fmt: skip
LABELS = ("no", "maybe", "yes")
DATA: dict[str, dict[str, Any] | str | None] = {
    "causal-lm": None,
    "sequence-classification": {"kind": "classification", "columns": ["text"], "labels": LABELS},
    "regression": "glue/stsb",
    "question-answering": "squad/v2",
    "seq2seq-lm": "summarisation/xsum",
}


@dataclass(frozen=True)
class Cell:
    """One way to train one head."""

    kind: str
    task: str
    method: str
    stage: int
    zero3: str = "sharded_base"
    adapter: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"

    def config(self, model: Path) -> RunConfig:
        eager = {"attn_implementation": "eager"} if self.kind == "deberta-v2" else {}
        return parse_config({
            "output_dir": "unused", "deepspeed": "unused",
            "model": {"path": str(model), "task": self.task, **eager},
            "adapter": {"rank": 3, "alpha": 8, "init_std": 0.1, "target_modules": TARGETS[self.kind], **self.adapter},
            "method": METHODS[self.method], "data": {"train": "unused", "task": DATA[self.task]},
            "speed": {"zero3": self.zero3},
            "train": {"max_steps": STEPS, "global_batch_size": GLOBAL_BATCH, "micro_batch_size": 1, "lr": 0.02,
                      "precision": self.precision, "weight_decay": 0.1},
        })  # fmt: skip


def build(cell: Cell, model: Path, world_size: int, kept_N: torch.Tensor | None = None) -> AllocatingEngine:
    config = cell.config(model)
    zero = {"stage": cell.stage, "reduce_bucket_size": 20000, "allgather_bucket_size": 20000}
    zero |= {"stage3_param_persistence_threshold": 0} if cell.stage == 3 else {}
    raw = {"zero_optimization": zero, "steps_per_print": 10**9}
    ds_config = effective_config(resolve_ds_config(raw, config, world_size, STEPS), config, world_size)
    labels = LABELS if cell.task == "sequence-classification" else ()
    base = load_base(config.model, config.train, ds_config, labels)
    probes = ProbeData(1, lambda j: micro(cell, 99, j)) if cell.method == "heterolora" else None
    return assemble(
        base.model, config, ds_config, STEPS, torch.device("cpu"), kept_N=kept_N, fresh=base.fresh, probe_data=probes
    )


def micro(cell: Cell, step: int, row: int) -> MicroBatch:
    inputs = example(cell.task, step, row)
    return MicroBatch(inputs, targets(cell.task, inputs), (row,))


def advance(engine: AllocatingEngine, cell: Cell, until: int, global_rank: int, world_size: int) -> list[float]:
    losses, share = [], GLOBAL_BATCH // world_size
    while engine.step < until:
        everything = [micro(cell, engine.step, row) for row in range(GLOBAL_BATCH)]
        mine = everything[global_rank * share : (global_rank + 1) * share]
        losses.append(engine.train_step(mine, sum(batch.num_targets for batch in everything)).loss)
    return losses


def run(global_rank: int, world_size: int, bases: dict[str, Path], cells: dict[str, Cell], folder: Path) -> Any:
    """Every cell in turn: what there is to know about it."""
    return {key: one(global_rank, world_size, bases[cell.kind], cell, folder / key) for key, cell in cells.items()}


def one(global_rank: int, world_size: int, base: Path, cell: Cell, folder: Path) -> dict[str, Any]:
    engine = build(cell, base, world_size)
    start = {name: value.clone() for name, value in in_full(engine).items()}
    losses = advance(engine, cell, STOP, global_rank, world_size)
    saved = checkpoint.save(engine.state, folder / "checkpoints", {}, {}, keep=9)
    losses += advance(engine, cell, STEPS, global_rank, world_size)
    engine.finish()
    end = checkpoint.save(engine.state, folder / "checkpoints", {}, {}, keep=9)
    inputs = probe(cell)
    engine.engine.eval()
    with torch.no_grad():
        logits = logits_of(engine.engine(**inputs))
    head = head_facts(engine.adapted.model, cell.task)
    exported = write_exports(cell, base, folder, head) if global_rank == 0 else None
    result = {"losses": losses, "full": engine.adapted.full, "start": start, "end": in_full(engine), "logits": logits,
              "groups": [g["name"] for g in engine.engine.basic_optimizer.param_groups],
              "exported": exported}  # fmt: skip
    engine.engine.destroy()
    result["again"] = resume(cell, base, saved, global_rank, world_size)
    result["saved"], result["final"] = saved, end
    return result


def resume(cell: Cell, base: Path, saved: Path, global_rank: int, world_size: int) -> dict[str, Any]:
    engine = build(cell, base, world_size, checkpoint.kept_rows(saved))
    checkpoint.load(engine.state, saved, {})
    found = {"losses": advance(engine, cell, STEPS, global_rank, world_size), "end": in_full(engine)}
    engine.engine.destroy()
    return found


def elsewhere(global_rank: int, world_size: int, bases: dict[str, Path], jobs: dict[str, tuple[Cell, Path]]) -> Any:
    """Resume checkpoints on this number of processes."""
    return {key: resume(cell, bases[cell.kind], saved, global_rank, world_size) for key, (cell, saved) in jobs.items()}


def in_full(engine: AllocatingEngine) -> dict[str, torch.Tensor]:
    """This process' share of every module trained in full, as fp32 masters."""
    shards = engine.shards
    return {f"{f.name}|{f.lo}": shards.master(f).clone() for f in shards.layout.fragments if f.name not in shards.owned}


def probe(cell: Cell) -> dict[str, torch.Tensor]:
    """Inputs of the comparison with other libraries: no labels, but what a decoder reads."""
    inputs = {k: v for k, v in example(cell.task, 99, 2).items() if k in ("input_ids", "attention_mask")}
    if cell.task == "seq2seq-lm":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    return inputs


def write_exports(cell: Cell, base: Path, folder: Path, head: dict[str, Any]) -> dict[str, Path]:
    """The end of the run as a PEFT adapter and as a merged model."""
    config = cell.config(base).model_dump(mode="json", by_alias=True)
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"template": None, "head": head}))
    return {form: export_run(folder, form, folder / form) for form in ("peft", "merged")}  # type: ignore[arg-type]
