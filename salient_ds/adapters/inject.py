"""Replace the targeted linear layers of a transformers model by adapters."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from salient_ds.adapters.bank import PackedModel
from salient_ds.adapters.growing import GrowingLinear
from salient_ds.adapters.module_score import ModuleScores
from salient_ds.adapters.orthogonality import OrthogonalityPenalty
from salient_ds.adapters.ranked_linear import PlainLinear, RankedLinear, SVDLinear
from salient_ds.adapters.shortcut import Shortcut, ShortcutKind, ShortcutOptions, choose_shortcuts, is_shortcut
from salient_ds.adapters.shortcut_wiring import shortcut_names, wire_shortcuts
from salient_ds.adapters.switched import SwitchedLinear
from salient_ds.adapters.two_scale import TwoScaleLinear
from salient_ds.config import AdapterConfig
from salient_ds.method_config import HeteroLoRAConfig, IncreLoRAConfig, LoRA2Config, LoRAConfig, MethodConfig
from salient_ds.methods.base import RankLayout
from salient_ds.salience.growth import first_room, reserve_rows
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
    packed: PackedModel | None = None
    """The model with its factors in banks of a few layers each; None: every factor is a parameter of its own."""

    @property
    def trained(self) -> nn.Module:
        """What an engine is built over: holds every trainable parameter."""
        return self.model if self.packed is None else self.packed

    def pack(self) -> None:
        """Move the factors of every layer into a bank."""
        self.packed = PackedModel(self.model, self.adapters)

    def set_mask(self, mask_N: torch.Tensor, gate: bool, final: bool = True) -> None:
        """Write a decision's mask (bool, any device) into every adapter; see :meth:`RankedLinear.set_mask`."""
        for adapter, mask_R in zip(self.adapters.values(), mask_N.split(list(self.layout.ranks)), strict=True):
            adapter.set_mask(mask_R, gate, final)

    @cached_property
    def is_shortcut_M(self) -> tuple[bool, ...]:
        """Which of the modules are shortcuts."""
        return tuple(is_shortcut(name) for name in self.adapters)

    @cached_property
    def parameters_M(self) -> tuple[int, ...]:
        """Trainable elements of every module."""
        return tuple(sum(math.prod(f.shape) for f in a.factors().values()) for a in self.adapters.values())

    def module_mask(self, mask_M: torch.Tensor) -> torch.Tensor:
        """The rows (bool, N) of the modules that are on (bool, M)."""
        return mask_M[self.layout.module_of_row_N]


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
    shortcuts: ShortcutOptions | None = None,
    switched: bool = False,
    in_flight: bool = False,
) -> AdaptedModel:
    """Freeze ``model`` and wrap its targeted layers in place. A fresh adapter does not change any output.

    Works on modules whose weights ZeRO-3 has already partitioned: only their sizes are read.

    Args:
        shortcuts: HeteroLoRA's, added after all linear layers; ``target_modules`` may then be empty.
        switched: the linear layers get HeteroLoRA's adapter, which a mask turns off as a whole.
        in_flight: adapters that grow begin with the rows that they need first, not with all of them.

    Raises:
        ValueError: if ``adapter.target_modules`` matches no linear layer (with the names there are), or shortcuts are
            not defined for the model.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    candidates = linear_modules(model)
    names = [] if shortcuts and not adapter.target_modules else select_modules(list(candidates), adapter.target_modules)
    penalty = _penalty(adapter, method, len(names))
    scores = ModuleScores(len(names), method.block_bytes) if isinstance(method, IncreLoRAConfig) else None
    build = (
        _switched_builder(adapter, dtype, device)
        if switched
        else _builder(adapter, method, penalty, scores, len(names), dtype, device, in_flight)
    )
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
    if shortcuts is not None:
        adapters.update(_add_shortcuts(model, shortcuts, seed, dtype, device))
    layout = RankLayout(
        modules=tuple(adapters),
        ranks=tuple(a.rank for a in adapters.values()),
        in_features=tuple(a.in_features for a in adapters.values()),
        out_features=tuple(a.out_features for a in adapters.values()),
    )
    return AdaptedModel(model, adapters, layout, penalty, scores)


def _add_shortcuts(
    model: nn.Module, options: ShortcutOptions, seed: int, dtype: torch.dtype, device: torch.device | None
) -> dict[str, RankedLinear]:
    names = choose_shortcuts(shortcut_names(model), options.modules)
    config: Any = model.config
    size, scaling = config.get_text_config().hidden_size, options.alpha / options.rank
    added = {}
    for name in names:
        kind = cast(ShortcutKind, name.rpartition(".")[2])
        generator = module_generator(seed, name)
        added[name] = Shortcut(kind, size, options.rank, scaling, options.dropout, generator, dtype, device)
        if device is not None:
            added[name].rank_mask_R = added[name].rank_mask_R.to(device)
    wire_shortcuts(model, added, options.norm_after_shortcut)
    return dict(added)


def _penalty(adapter: AdapterConfig, method: MethodConfig, num_modules: int) -> OrthogonalityPenalty | None:
    if isinstance(method, LoRAConfig | HeteroLoRAConfig):
        return None
    terms = 5 if isinstance(method, LoRA2Config) else 2
    return OrthogonalityPenalty(num_modules, adapter.orthogonality.coefficient, adapter.orthogonality.form, terms)


def _switched_builder(adapter: AdapterConfig, dtype: torch.dtype, device: torch.device | None) -> Build:
    rank, scaling = adapter.rank, adapter.alpha / adapter.rank
    return lambda base, g: SwitchedLinear(base, rank, scaling, adapter.dropout, g, dtype, device)


def _builder(
    adapter: AdapterConfig,
    method: MethodConfig,
    penalty: OrthogonalityPenalty | None,
    scores: ModuleScores | None,
    num_modules: int,
    dtype: torch.dtype,
    device: torch.device | None,
    in_flight: bool,
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
        room = first_room(method, num_modules, rank) if in_flight else rank
        return lambda base, g: GrowingLinear(
            base, rank, method.start_rank, reserve, adapter.alpha, dropout, adapter.init_std, g, penalty, scores,
            dtype, device, room,
        )  # fmt: skip
    return lambda base, g: SVDLinear(
        base, rank, scaling, dropout, adapter.init_std, g, penalty, dtype=dtype, device=device
    )
