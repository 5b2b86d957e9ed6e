"""Replace the targeted linear layers of a transformers model by adapters."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from salient_ds.adapters.growing import GrowingLinear
from salient_ds.adapters.module_score import ModuleScores
from salient_ds.adapters.orthogonality import OrthogonalityPenalty
from salient_ds.adapters.ranked_linear import PlainLinear, RankedLinear, SVDLinear
from salient_ds.adapters.two_scale import TwoScaleLinear
from salient_ds.config import AdapterConfig
from salient_ds.method_config import IncreLoRAConfig, LoRA2Config, LoRAConfig, MethodConfig
from salient_ds.methods.base import RankLayout
from salient_ds.salience.growth import reserve_rows
from salient_ds.targets import select_modules

Build = Callable[[nn.Linear, torch.Generator], RankedLinear]


@dataclass
class AdaptedModel:
    """A model whose targeted layers are adapters; everything else is frozen."""

    model: nn.Module
    adapters: dict[str, RankedLinear]
    """By module path in the base model, in model order."""
    layout: RankLayout
    penalty: OrthogonalityPenalty | None
    scores: ModuleScores | None = None
    """Where a method needs them, the scores of whole matrices that backward passes leave behind."""

    def set_mask(self, mask_N: torch.Tensor, gate: bool, final: bool = True) -> None:
        """Write a decision's mask (bool, any device) into every adapter; see :meth:`RankedLinear.set_mask`."""
        for adapter, mask_R in zip(self.adapters.values(), mask_N.split(list(self.layout.ranks)), strict=True):
            adapter.set_mask(mask_R, gate, final)


def module_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on seed and module path only: the same start at any ZeRO stage and process count."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def linear_modules(model: Any) -> dict[str, nn.Linear]:
    """All ``nn.Linear`` layers by path, without the output embedding (it is tied or excluded by convention)."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def inject(
    model: nn.Module,
    adapter: AdapterConfig,
    method: MethodConfig,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> AdaptedModel:
    """Freeze ``model`` and wrap its targeted layers in place. A fresh adapter does not change any output.

    Works on modules whose weights ZeRO-3 has already partitioned: only their sizes are read.

    Raises:
        ValueError: if ``adapter.target_modules`` matches no linear layer (with the names there are).
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    candidates = linear_modules(model)
    names = select_modules(list(candidates), adapter.target_modules)
    penalty = _penalty(adapter, method, len(names))
    scores = ModuleScores(len(names), method.block_bytes) if isinstance(method, IncreLoRAConfig) else None
    build = _builder(adapter, method, penalty, scores, len(names), dtype, device)
    adapters: dict[str, RankedLinear] = {}
    for slot, name in enumerate(names):
        wrapped = build(candidates[name], module_generator(seed, name))
        if isinstance(wrapped, SVDLinear | TwoScaleLinear):
            wrapped.penalty_slot = slot
        if device is not None:
            wrapped.rank_mask_R = wrapped.rank_mask_R.to(device)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapped)
        adapters[name] = wrapped
    layout = RankLayout(
        modules=tuple(adapters),
        ranks=tuple(a.rank for a in adapters.values()),
        in_features=tuple(a.in_features for a in adapters.values()),
        out_features=tuple(a.out_features for a in adapters.values()),
    )
    return AdaptedModel(model, adapters, layout, penalty, scores)


def _penalty(adapter: AdapterConfig, method: MethodConfig, num_modules: int) -> OrthogonalityPenalty | None:
    if isinstance(method, LoRAConfig):
        return None
    terms = 5 if isinstance(method, LoRA2Config) else 2
    return OrthogonalityPenalty(num_modules, adapter.orthogonality.coefficient, adapter.orthogonality.form, terms)


def _builder(
    adapter: AdapterConfig,
    method: MethodConfig,
    penalty: OrthogonalityPenalty | None,
    scores: ModuleScores | None,
    num_modules: int,
    dtype: torch.dtype,
    device: torch.device | None,
) -> Build:
    rank, dropout = adapter.rank, adapter.dropout
    scaling = adapter.alpha / rank
    if isinstance(method, LoRAConfig):
        if method.rslora:
            scaling = adapter.alpha / math.sqrt(rank)
        if method.form == "plain":
            return lambda base, g: PlainLinear(base, rank, scaling, dropout, g, dtype, device)
    if isinstance(method, LoRA2Config):
        return lambda base, g: TwoScaleLinear(
            base, rank, method.inner_width, scaling, dropout, adapter.init_std, g, penalty, dtype, device
        )
    if isinstance(method, IncreLoRAConfig):
        reserve = reserve_rows(method, num_modules)
        return lambda base, g: GrowingLinear(
            base, rank, method.start_rank, reserve, adapter.alpha, dropout, adapter.init_std, g, penalty, scores,
            dtype, device,
        )  # fmt: skip
    return lambda base, g: SVDLinear(
        base, rank, scaling, dropout, adapter.init_std, g, penalty, dtype=dtype, device=device
    )
