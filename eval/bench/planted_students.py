"""Students of a planted teacher, one for every arm. All end at the same total rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from salient_ds.adapters.inject import AdaptedModel, inject, layout_of, module_generator
from salient_ds.adapters.options import AdapterConfig
from salient_ds.adapters.ranked_linear import PlainLinear, RankedLinear, SVDLinear
from salient_ds.engine.build import parameter_groups
from salient_ds.methods.duties import Method
from salient_ds.methods.lora.options import LoRAConfig

from .planted_plan import Arm, ProblemSize, Training, method_config
from .planted_problem import Problem

INIT_STD = 0.02


@dataclass(frozen=True)
class Student:
    """A model to train, and the method that decides its ranks."""

    model: nn.Module
    adapted: AdaptedModel
    method: Method
    sigma_ratio: float
    """Learning rate of singular values, as a multiple of that of the factors."""

    def optimizer(self, lr: float) -> torch.optim.AdamW:
        """AdamW over the adapters. Every group's ``peak`` is its highest learning rate."""
        groups = parameter_groups(self.adapted, lr, 0.0, self.sigma_ratio)
        return torch.optim.AdamW([{"peak": group.get("lr", lr)} | group for group in groups], lr=lr, fused=True)


def build_student(arm: Arm, problem: Problem, size: ProblemSize, training: Training, seed: int) -> Student:
    """Copy the frozen network and add adapters whose update has the multiplier 1 at any rank (alpha = rank).

    For methods that grow, the multiplier is alpha / current rank. It is 1 at the mean rank of the budget.
    """
    model = copy.deepcopy(problem.base)
    config = method_config(arm, size, training)
    if arm.oracle:
        assert isinstance(config, LoRAConfig)
        adapted = with_ranks(model, problem.ranks, config, seed)
    else:
        rank = size.uniform_rank if arm.start == "uniform" else training.initial_rank
        adapter = AdapterConfig.model_validate({
            "rank": rank, "alpha": size.uniform_rank if arm.start == "grow" else rank, "target_modules": "all-linear",
            "orthogonality": {"coefficient": training.orthogonality}, "init_std": INIT_STD,
        })  # fmt: skip
        adapted = inject(model, adapter, config, seed, torch.float32)
    ratio = config.sigma_ratio(adapted.layout, INIT_STD) if training.sigma_lr == "auto" else training.sigma_lr
    return Student(model, adapted, config.build(adapted.layout, training.steps, training.rates), ratio)


def with_ranks(model: nn.Module, ranks: dict[str, int], config: LoRAConfig, seed: int) -> AdaptedModel:
    """Add adapters of the given, fixed ranks. Matrices of rank 0 get none."""
    adapters: dict[str, RankedLinear] = {}
    plain = config.form == "plain"
    build: Callable[..., RankedLinear] = PlainLinear if plain else SVDLinear
    for name, rank in ranks.items():
        if rank == 0:
            continue
        start: dict[str, Any] = {"generator": module_generator(seed, name)} | ({} if plain else {"init_std": INIT_STD})
        adapter = build(model.get_submodule(name), rank, 1.0, **start)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter)
        adapters[name] = adapter
    return AdaptedModel(model, adapters, layout_of(adapters), None)
