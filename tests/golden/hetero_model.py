"""Reads HeteroLoRA's golden numbers and builds the tiny models that they are from (see hetero/README.md)."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForSequenceClassification

from salient_ds.adapters.inject import AdaptedModel, inject
from salient_ds.adapters.options import AdapterConfig, ShortcutConfig
from salient_ds.adapters.ranked_linear import RankedLinear
from salient_ds.heterolora.injection import add_shortcuts
from salient_ds.heterolora.options import HeteroLoRAConfig

FOLDER = Path(__file__).parent / "hetero"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""In the reference's order of candidates."""

Group = dict[str, Tensor]


@cache
def read_json(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text())


@cache
def _values() -> Tensor:
    with np.load(FOLDER / "tensors.npz") as file:
        return torch.from_numpy(file["values"])


def group(file: str, *path: str) -> Group:
    """Tensors (float64) of one group of an original file, e.g. ``group("opt_ags_warm", "all_on")``."""
    first, *rest = path
    prefix = "".join(f"{part}/" for part in rest)
    found = {}
    for name, (offset, *shape) in read_json("index")["tensors"][file][first].items():
        if name.startswith(prefix):
            count = int(np.prod(shape))
            found[name.removeprefix(prefix)] = _values()[offset : offset + count].view(shape).clone()
    return found


def other(file: str, key: str) -> Any:
    """What is not a float tensor in an original file: token ids, names, masks."""
    return read_json("index")["other"][file][key]


def our_name(name: str) -> str:
    """The path of a parameter of the reference in a model of ours that has adapters."""
    for letter in "AB":
        name = name.replace(f".lora_{letter}.a.weight", f".lora_{letter}")
        name = name.replace(f".proj_{letter}.p.weight", f".lora_{letter}")
    return name


def load(model: torch.nn.Module, weights: Group) -> None:
    """Copy the reference's weights; every parameter of the model must get one."""
    parameters = dict(model.named_parameters())
    wanted = {name.replace(".base.", "."): name for name in parameters}
    if "lm_head.weight" in wanted and "lm_head.weight" not in weights:
        del wanted["lm_head.weight"]
    given = {our_name(name): value for name, value in weights.items()}
    assert given.keys() >= wanted.keys(), sorted(wanted.keys() - given.keys())
    for name, ours in wanted.items():
        parameters[ours].data.copy_(given[name])


def tiny_opt(weights: Group, shortcuts: bool, norm: Any = "reuse") -> AdaptedModel:
    """OPT with LoRA r 2, alpha 16 on all six projections and, if asked, shortcuts r 2, alpha 4; float64."""
    config = OPTConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=3, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=12,
        do_layer_norm_before=False, dropout=0.0, attention_dropout=0.0, max_position_embeddings=32, pad_token_id=1,
        num_labels=2,
    )  # fmt: skip
    adapter = AdapterConfig(rank=2, alpha=16, target_modules=list(PROJECTIONS))
    return _adapt(OPTForSequenceClassification(config), adapter, weights, shortcuts, norm)


def tiny_llama(weights: Group, shortcuts: bool, norm: Any = "reuse") -> AdaptedModel:
    """LLaMA with LoRA r 2, alpha 16 on queries and values and, if asked, shortcuts r 2, alpha 4; float64."""
    config = LlamaConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=3, intermediate_size=24, num_attention_heads=2,
        num_key_value_heads=1, rms_norm_eps=1e-6, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    adapter = AdapterConfig(rank=2, alpha=16, target_modules=["q_proj", "v_proj"])
    return _adapt(LlamaForCausalLM(config), adapter, weights, shortcuts, norm)


def _adapt(model: Any, adapter: AdapterConfig, weights: Group, shortcuts: bool, norm: Any) -> AdaptedModel:
    if shortcuts:
        options = ShortcutConfig(rank=2, alpha=4, norm_after_shortcut=norm)
        adapter = adapter.model_copy(update={"shortcuts": options})
    adapted = inject(model.double().eval(), adapter, HeteroLoRAConfig(), 0, torch.float64)
    if shortcuts:
        add_shortcuts(adapted, adapter, 0, torch.float64)
    load(adapted.model, weights)
    return adapted


def short_name(path: str) -> str:
    """ "2.fc1" of "model.decoder.layers.2.fc1"."""
    parts = path.split(".")
    return f"{next(p for p in parts if p.isdigit())}.{parts[-1]}"


def by_short_name(adapted: AdaptedModel) -> dict[str, RankedLinear]:
    """Adapters in the reference's order: layers ascending, linear ones first."""
    found = {short_name(path): adapter for path, adapter in adapted.adapters.items()}
    layers = sorted({int(name.split(".")[0]) for name in found})
    linear = [f"{i}.{p}" for i in layers for p in PROJECTIONS if f"{i}.{p}" in found]
    return {name: found[name] for name in [*linear, *(n for n in found if n not in linear)]}


def switch(adapted: AdaptedModel, on: dict[str, bool]) -> None:
    """Turn modules on and off by short name."""
    mask_M = torch.tensor([on[short_name(path)] for path in adapted.adapters])
    adapted.set_mask(mask_M[adapted.layout.module_of_row_N], gate=True, final=False)
