"""The events of any method, from its configuration alone. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from salient_ds.method_config import (
    AdaLoRAConfig,
    HeteroLoRAConfig,
    IncreLoRAConfig,
    LoRA2Config,
    LoRAConfig,
    MethodConfig,
    SalientLoRAConfig,
)
from salient_ds.salience.budget import AllocationPlan, Event, salient_events, salient_plan
from salient_ds.salience.cubic_budget import cubic_events, cubic_plan
from salient_ds.salience.growth import GrowthPlan, growth_events, growth_plan
from salient_ds.salience.search_schedule import SearchSpace, largest_total, search_events


def method_events(
    config: MethodConfig,
    ranks: Sequence[int],
    total_steps: int,
    space: SearchSpace | None = None,
    steps_per_epoch: int | None = None,
) -> list[Event]:
    """All allocations of a run over matrices with the given initial ``ranks``, in order; none for fixed ranks.

    For IncreLoRA ``ranks`` are the rows that are preallocated. HeteroLoRA alone needs the last two arguments.

    Raises:
        ValueError: ranks have to go or come, but the schedule has no event, or its numbers contradict each other.
    """
    if isinstance(config, SalientLoRAConfig):
        return salient_events(config, ranks, total_steps)
    if isinstance(config, AdaLoRAConfig | LoRA2Config):
        return cubic_events(config, ranks, total_steps)
    if isinstance(config, IncreLoRAConfig):
        return growth_events(config, ranks, total_steps)
    if isinstance(config, HeteroLoRAConfig):
        assert space is not None, "modules that can be switched are not ranks alone"
        return search_events(config, space, total_steps, steps_per_epoch)
    assert isinstance(config, LoRAConfig), f"no schedule for {type(config).__name__}"
    return []


def method_plan(config: MethodConfig, ranks: Sequence[int], total_steps: int) -> AllocationPlan | GrowthPlan | None:
    """The numbers behind :func:`method_events`: initial and target total, warm-ups; None for fixed ranks.

    Raises:
        ValueError: see :class:`AllocationPlan` and :class:`GrowthPlan`.
    """
    if isinstance(config, SalientLoRAConfig):
        return salient_plan(config, ranks, total_steps)
    if isinstance(config, AdaLoRAConfig | LoRA2Config):
        return cubic_plan(config, ranks, total_steps)
    if isinstance(config, IncreLoRAConfig):
        return growth_plan(config, ranks, total_steps)
    assert isinstance(config, LoRAConfig | HeteroLoRAConfig), f"no plan for {type(config).__name__}"
    return None


def initial_total(config: MethodConfig, ranks: Sequence[int]) -> int:
    """Sum of ranks before the first event; below the preallocated one for methods that let ranks grow."""
    return config.start_rank * len(ranks) if isinstance(config, IncreLoRAConfig) else sum(ranks)


def target_total(config: MethodConfig, ranks: Sequence[int], total_steps: int, space: SearchSpace | None = None) -> int:
    """Sum of ranks at the end (HeteroLoRA: at most)."""
    if isinstance(config, HeteroLoRAConfig):
        assert space is not None
        return largest_total(config, space)
    plan = method_plan(config, ranks, total_steps)
    return plan.target_total if plan else sum(ranks)
