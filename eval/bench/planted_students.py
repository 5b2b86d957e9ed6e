"""Students of a planted teacher, one for every arm. All end at the same total rank."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from salient_ds.adapters.inject import AdaptedModel, inject, layout_of, module_generator
from salient_ds.adapters.options import AdapterConfig
from salient_ds.adapters.ranked_linear import PlainLinear, RankedLinear, SVDLinear
from salient_ds.methods.duties import Method
from salient_ds.methods.lora.options import LoRAConfig

from .planted_plan import Arm, ProblemSize, Training, method_config
from .planted_problem import Problem


@dataclass(frozen=True)
class Student:
    """A model to train, and the method that decides its ranks."""

    model: nn.Module
    adapted: AdaptedModel
    method: Method


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
            "orthogonality": {"coefficient": training.orthogonality},
        })  # fmt: skip
        adapted = inject(model, adapter, config, seed, torch.float32)
    return Student(model, adapted, config.build(adapted.layout, training.steps, training.rates))


def with_ranks(model: nn.Module, ranks: dict[str, int], config: LoRAConfig, seed: int) -> AdaptedModel:
    """Add adapters of the given, fixed ranks. Matrices of rank 0 get none."""
    adapters: dict[str, RankedLinear] = {}
    plain = config.form == "plain"
    build: Callable[..., RankedLinear] = PlainLinear if plain else SVDLinear
    for name, rank in ranks.items():
        if rank == 0:
            continue
        adapter = build(model.get_submodule(name), rank, 1.0, generator=module_generator(seed, name))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter)
        adapters[name] = adapter
    return AdaptedModel(model, adapters, layout_of(adapters), None)
