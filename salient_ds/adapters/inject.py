"""Replace the targeted linear layers of a transformers model with adapters."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from salient_ds.adapters.forms import AdapterForm, HasForm, Wrapping
from salient_ds.adapters.full import is_inside, parts
from salient_ds.adapters.module_score import ModuleScores
from salient_ds.adapters.options import AdapterConfig
from salient_ds.adapters.orthogonality import OrthogonalityPenalty
from salient_ds.adapters.packed_model import PackedModel
from salient_ds.adapters.rank_pattern import ranks_of
from salient_ds.adapters.ranked_linear import RankedLinear
from salient_ds.adapters.survey import ShapeOf, linear, survey, whole_shape
from salient_ds.adapters.targets import is_shortcut
from salient_ds.ranks import RankLayout


@dataclass
class AdaptedModel:
    """A model whose targeted layers are adapters. Everything else is frozen, except for modules trained in full."""

    model: nn.Module
    adapters: dict[str, RankedLinear]
    """By module path in the base model, in model order."""
    layout: RankLayout
    penalty: OrthogonalityPenalty | None
    scores: ModuleScores | None = None
    """Scores of whole matrices, filled in by backward passes; None if the method needs none."""
    packed: PackedModel | None = None
    """The model with its factors packed in banks of a few layers each; None: every factor is its own parameter."""
    notes: tuple[str, ...] = ()
    """What is left out although one could expect it to be adapted, one sentence each."""
    full: tuple[str, ...] = ()
    """Paths of the modules that are trained in full, beside the adapters."""

    @property
    def trained(self) -> nn.Module:
        """The module that an engine is built over. It holds every trainable parameter."""
        return self.model if self.packed is None else self.packed

    @property
    def names_in_full(self) -> dict[int, str]:
        """By id of each parameter that is trained in full: its path in the model, whether or not factors are packed."""
        return {id(p): name for name, p in self.model.named_parameters()
                if any(is_inside(name, module) for module in self.full)}  # fmt: skip

    def pack(self) -> None:
        """Move the factors of all layers into banks."""
        self.packed = PackedModel(self.model, self.adapters)

    def generate(self, **settings: Any) -> torch.Tensor:
        """``model.generate`` with the adapters as they are now."""
        if self.packed is not None:
            self.packed.begin()
        tokens: torch.Tensor = self.model.generate(**settings)  # type: ignore[operator]
        return tokens

    def set_mask(self, mask_N: torch.Tensor, gate: bool, final: bool = True) -> None:
        """Write a decision's mask (bool, any device) into every adapter; see :meth:`RankedLinear.set_mask`."""
        for adapter, mask_R in zip(self.adapters.values(), mask_N.split(list(self.layout.ranks)), strict=True):
            adapter.set_mask(mask_R, gate, final)

    @cached_property
    def is_shortcut_M(self) -> tuple[bool, ...]:
        """For every module, whether it is a shortcut."""
        return tuple(is_shortcut(name) for name in self.adapters)

    @cached_property
    def parameters_M(self) -> tuple[int, ...]:
        """Number of trainable elements of every module."""
        return tuple(sum(math.prod(f.shape) for f in a.factors().values()) for a in self.adapters.values())


def module_generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends only on seed and module path.

    So initial values are the same at any ZeRO stage and process count.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def inject(
    model: nn.Module,
    adapter: AdapterConfig,
    method: HasForm,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
    *,
    in_flight: bool = False,
    shape_of: ShapeOf = whole_shape,
    fresh: Sequence[str] = (),
) -> AdaptedModel:
    """Freeze ``model``, except for modules that are trained in full, and wrap its targeted layers in place.

    Fresh adapters do not change any output (IncreLoRA's reserve rows: hardly). This also works if ZeRO-3 has already
    partitioned the weights, because only their sizes are read.

    Args:
        method: the options of the method, which name the form of its adapters.
        in_flight: growing adapters start with only the rows that they need first, instead of all rows.
        shape_of: gives the shape of a whole parameter, if ZeRO-3 may have partitioned it.
        fresh: names of the parameters that the checkpoint lacked.

    Raises:
        ValueError: ``adapter.target_modules`` matches no linear layer; the message lists the available names. It may be
            empty only if ``adapter.shortcuts`` is set. Or ``rank_pattern`` or ``also_train`` name what is not there.
    """
    full = parts(model, shape_of).trained(adapter, fresh)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(is_inside(name, module) for module in full))
    found, names, notes = survey(model, shape_of).without(full), [], []
    if adapter.shortcuts is None or adapter.target_modules:
        names, notes = found.select(adapter.target_modules), found.notes(adapter.target_modules)
    ranks = ranks_of(names, adapter.rank, adapter.rank_pattern)
    names = [name for name in names if ranks[name]]
    form = method.adapter_form(len(names), adapter.rank, in_flight)
    terms, penalty = form.penalty_terms, None
    if terms:
        orthogonality = adapter.orthogonality
        penalty = OrthogonalityPenalty(len(names), orthogonality.coefficient, orthogonality.form, terms)
    scores = ModuleScores(len(names), method.scoring_bytes) if method.scoring_bytes else None
    adapters: dict[str, RankedLinear] = {}
    for slot, name in enumerate(names):
        wrapping = Wrapping(
            rank=ranks[name], alpha=alpha_of(ranks[name], adapter, form), dropout=adapter.dropout,
            init_std=adapter.init_std, generator=module_generator(seed, name), penalty=penalty, scores=scores,
            dtype=dtype, device=device,
        )  # fmt: skip
        wrapped = form.wrap(linear(model, name), wrapping)
        if penalty is not None:
            wrapped.penalty_slot = slot
        if device is not None:
            wrapped.rank_mask_R = wrapped.rank_mask_R.to(device)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, wrapped)
        adapters[name] = wrapped
    return AdaptedModel(model, adapters, layout_of(adapters), penalty, scores, notes=tuple(notes), full=tuple(full))


def alpha_of(rank: int, adapter: AdapterConfig, form: AdapterForm) -> float:
    """The numerator that gives a matrix of ``rank`` rows the scaling of one with ``adapter.rank`` rows."""
    if rank == adapter.rank:
        return adapter.alpha
    return adapter.alpha * form.scaling(1.0, adapter.rank) / form.scaling(1.0, rank)


def layout_of(adapters: Mapping[str, RankedLinear]) -> RankLayout:
    """Names, ranks and sizes of ``adapters``."""
    return RankLayout(
        modules=tuple(adapters),
        ranks=tuple(a.rank for a in adapters.values()),
        in_features=tuple(a.in_features for a in adapters.values()),
        out_features=tuple(a.out_features for a in adapters.values()),
    )
