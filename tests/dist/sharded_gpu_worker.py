"""Started by DeepSpeed's launcher: losses of one training with the base whole and sharded, layers large, batches small.

``sharded_gpu_worker.py FOLDER HIDDEN``: random weights go to FOLDER/model, losses to FOLDER/losses-RANK.json. Gathering
a layer then takes longer than running one, so that whoever does not wait for it reads something else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from salient_ds.config.run import parse_config
from salient_ds.engine.reports import MicroBatch
from salient_ds.models.loading import load_model
from salient_ds.run.assemble import assemble
from salient_ds.zero.ds_json import resolve_ds_config
from salient_ds.zero.environment import start, stop
from salient_ds.zero.sharded_base import effective_config

LAYERS, STEPS = 7, 4
OFFLOAD = {"offload_param": {"device": "cpu", "pin_memory": True}}
WAYS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "whole": (2, {}, {"compile_layers": False}),
    "sharded": (3, {}, {"compile_layers": False}),
    "offloaded": (3, OFFLOAD, {"compile_layers": False}),
    "recomputed": (3, {}, {"compile_layers": False}),
    "compiled": (3, {}, {"compile_layers": True}),
    "compiled offloaded": (3, OFFLOAD, {"compile_layers": True}),
}


def save_model(folder: Path, hidden: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=192, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=LAYERS,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64, initializer_range=1.2 / hidden**0.5,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def train(way: str, model: Path, device: torch.device, global_rank: int, world_size: int) -> list[float]:
    stage, zero, speed = WAYS[way]
    config = parse_config({
        "output_dir": "unused", "deepspeed": "unused", "data": {"train": "unused"}, "model": {"path": str(model)},
        "adapter": {"rank": 8, "alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "method": {"name": "lora"},
        "speed": speed,
        "train": {"max_steps": STEPS, "global_batch_size": world_size, "micro_batch_size": 1, "lr": 0.02,
                  "precision": "fp32", "lr_schedule": "constant",
                  "activation_checkpointing": "all" if way == "recomputed" else "none"},
    })  # fmt: skip
    raw = {"zero_optimization": {"stage": stage, "overlap_comm": True} | zero, "steps_per_print": 10**9}
    ds_config = effective_config(resolve_ds_config(raw, config, world_size, STEPS), config, world_size)
    base = load_model(config.model, config.train, ds_config)
    if stage < 3:
        base.to(device)
    engine = assemble(base, config, ds_config, STEPS, device)
    losses = []
    for step in range(STEPS):
        draw = torch.Generator().manual_seed(10 * step + global_rank)
        tokens = torch.randint(3, 190, (1, 16), generator=draw).to(device)
        batch = MicroBatch({"input_ids": tokens, "labels": tokens}, 15, (global_rank,))
        report = engine.train_step([batch], 15 * world_size)
        losses.append(report.loss)
    engine.engine.destroy()
    return losses


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("hidden", type=int)
    args, _ = parser.parse_known_args()
    device = start(timeout_minutes=5)
    global_rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = args.folder / "model"
    if global_rank == 0:
        save_model(model, args.hidden)
    torch.distributed.barrier()
    found = {}
    for way in WAYS:
        found[way] = train(way, model, device, global_rank, world_size)
        (args.folder / f"losses-{global_rank}.json").write_text(json.dumps(found))
    stop()


if __name__ == "__main__":
    main()
