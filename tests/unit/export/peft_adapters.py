"""Random adapters that the real PEFT saves, and what a cut of them must be, from dense matrices."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from salient_ds.export.lora_folder import LoraFolder
from salient_ds.export.shrink import Shrinkage, plan_cut
from salient_ds.export.shrunk_folder import write_shrunk
from salient_ds.salience.spectral_cut import Cut
from tests.support.verify import logits_of, probe_inputs
from tests.unit.export.builders import VOCAB, build

INPUTS = probe_inputs(VOCAB, "CAUSAL_LM")
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RAGGED = {
    "r": 6, "lora_alpha": 9, "use_rslora": True, "target_modules": LINEARS,
    "rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.v_proj": 8},
    "alpha_pattern": {"k_proj": 20, "layers.0.mlp.down_proj": 2},
}  # fmt: skip
"""Ranks 3, 6 and 8, scales from 2 / sqrt(6) to 20 / sqrt(6)."""


def save_adapter(model: nn.Module, folder: Path, std: float = 0.1, seed: int = 0, **settings: Any) -> Path:
    """Wrap ``model`` by PEFT, give random values to all that is trained, and save the adapter."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(**({"task_type": "CAUSAL_LM"} | settings)))  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in wrapped.named_parameters():
            if value.requires_grad:
                assert "lora_" in name or "modules_to_save" in name or "bias" in name, name
                value.copy_(torch.randn(value.shape, generator=draw) * std)
    wrapped.save_pretrained(str(folder))
    return folder


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


def change_config(folder: Path, **changes: Any) -> None:
    (folder / "adapter_config.json").write_text(json.dumps(config_of(folder) | changes))


def dense_updates(folder: Path) -> dict[str, Tensor]:
    """Module -> scale * B A (O, I) in float64, written down without the code under test."""
    config, tensors = config_of(folder), load_file(folder / "adapter_model.safetensors")

    def stated(patterns: str, default: str, module: str) -> float:
        table: Mapping[str, float] = config.get(patterns, {})
        hits = [value for pattern, value in table.items() if re.search(rf"(^|\.)({pattern})$", module)]
        return hits[0] if hits else config[default]

    updates = {}
    for key, A_rI in tensors.items():
        if key.endswith("lora_A.weight"):
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            rank, alpha = stated("rank_pattern", "r", module), stated("alpha_pattern", "lora_alpha", module)
            scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
            updates[module] = scale * tensors[key.replace("lora_A", "lora_B")].double() @ A_rI.double()
    return updates


def truncated(update_OI: Tensor, rank: int) -> Tensor:
    """The closest matrix of that rank, from the dense decomposition."""
    U, S, V = torch.linalg.svd(update_OI, full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ V[:rank]


def shrink(source: Path, out: Path, cut: Cut, **more) -> Shrinkage:
    opened = LoraFolder(source)
    planned = plan_cut(opened, cut)
    write_shrunk(opened, planned, out, **more)
    return planned


@torch.no_grad()
def logits_with(folder: Path, kind: str = "llama", inputs=INPUTS) -> torch.Tensor:
    from peft import PeftModel

    return logits_of(PeftModel.from_pretrained(build(kind), str(folder)).eval()(**inputs))
