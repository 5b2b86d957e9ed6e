"""When HeteroLoRA switches modules on and off, and how large the sum of ranks may then be. No torch.

Letters: S = steps per epoch, N = steps between events. An event of step s comes after s applied steps and before step
s + 1. So the first event, of step 0, comes before training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from salient_ds.adapters.targets import is_shortcut
from salient_ds.ranks import Event, RankLayout
from salient_ds.salience.budget import refuse_many


class SearchSettings(Protocol):
    """The options that determine a schedule. HeteroLoRA's options class has all of them."""

    @property
    def keep(self) -> float: ...
    @property
    def mode(self) -> str: ...
    @property
    def budget_unit(self) -> str: ...
    @property
    def interval(self) -> float: ...
    @property
    def interval_unit(self) -> str: ...
    @property
    def constant_epochs(self) -> float: ...
    @property
    def search_end(self) -> float: ...


@dataclass(frozen=True)
class SearchSpace:
    """The modules that can be switched, in the order of the run's rank layout."""

    ranks: tuple[int, ...]
    parameters: tuple[int, ...]
    """Number of trainable elements of every module."""
    shortcuts: tuple[bool, ...]
    """Whether a module is a shortcut connection."""

    @classmethod
    def of(cls, layout: RankLayout) -> SearchSpace:
        """The modules of a layout. Shortcuts are recognised by their names."""
        sides = zip(layout.ranks, layout.in_features, layout.out_features, strict=True)
        parameters = tuple(rank * (wide + tall) for rank, wide, tall in sides)
        return cls(layout.ranks, parameters, tuple(is_shortcut(name) for name in layout.modules))

    def __post_init__(self) -> None:
        assert len(self.ranks) == len(self.parameters) == len(self.shortcuts)


def search_steps(config: SearchSettings, total_steps: int, steps_per_epoch: int | None) -> list[int]:
    """Number of applied steps before each event; 0 for the first.

    Source: the released code's rule "at step i of an epoch, if i mod N = 0", with N = ceil(S * interval). Differs from
    the reference: with interval_unit=steps the count continues from epoch to epoch (there it starts again).

    Raises:
        ValueError: the interval is given in epochs, and ``steps_per_epoch`` is None.
    """
    end = math.ceil(config.search_end * total_steps)
    if config.interval_unit == "steps":
        refuse_many(len(range(0, end, int(config.interval))))
        return list(range(0, end, int(config.interval)))
    epoch = _epoch(steps_per_epoch)
    distance = max(1, math.ceil(round(config.interval * epoch, 6)))
    refuse_many(end // min(distance, epoch))
    if distance >= epoch:
        return list(range(0, end, distance))
    return [step for first in range(0, end, epoch) for step in range(first, min(first + epoch, end), distance)]


def constant_steps(config: SearchSettings, steps_per_epoch: int | None) -> int:
    """The step at which scoring begins: events before it draw modules at random (``constant_epochs``).

    Raises:
        ValueError: there is such a phase, and ``steps_per_epoch`` is None.
    """
    return round(config.constant_epochs * _epoch(steps_per_epoch)) if config.constant_epochs else 0


def _epoch(steps_per_epoch: int | None) -> int:
    if steps_per_epoch is None:
        raise ValueError(
            "method.interval or method.constant_epochs is given in epochs, but the number of training rows is not "
            "known here: set method.interval_unit=steps and method.constant_epochs=0"
        )
    return steps_per_epoch


def largest_total(config: SearchSettings, space: SearchSpace) -> int:
    """The largest sum of ranks that the budget allows. The sum after an event depends on what the event chooses.

    Budget in modules: the two are equal if all candidates of a ranking have the same rank. Budget in parameters: this
    is an upper bound, because it counts the last module that fits only in part.
    """
    groups = _groups(config, space)
    always = sum(r for r, s in zip(space.ranks, space.shortcuts, strict=True) if s) if config.mode == "off" else 0
    if config.budget_unit == "modules":
        return always + sum(sum(sorted((space.ranks[k] for k in group), reverse=True)[:n]) for group, n in groups)
    total = 0
    for group, _ in groups:
        left = math.floor(config.keep * sum(space.parameters[k] for k in group))
        if left < min((space.parameters[k] for k in group), default=0):
            continue  # no module fits
        for k in sorted(group, key=lambda k: space.parameters[k] / space.ranks[k]):
            taken = min(left, space.parameters[k])
            total += taken * space.ranks[k] // space.parameters[k]
            left -= taken
    return always + total


def _groups(config: SearchSettings, space: SearchSpace) -> list[tuple[list[int], int]]:
    """The rankings: the candidates of each, and how many of them a budget in modules keeps."""
    linears = [k for k, shortcut in enumerate(space.shortcuts) if not shortcut]
    shortcuts = [k for k, shortcut in enumerate(space.shortcuts) if shortcut]
    keep_linears, keep_shortcuts = math.floor(config.keep * len(linears)), round(config.keep * len(shortcuts))
    if config.mode == "off":
        return [(linears, keep_linears)]
    if config.mode == "separated":
        return [(linears, keep_linears), (shortcuts, keep_shortcuts)]
    return [(linears + shortcuts, keep_linears + keep_shortcuts)]


def search_events(
    config: SearchSettings, space: SearchSpace, total_steps: int, steps_per_epoch: int | None
) -> list[Event]:
    """All events of a run. Their ``total_rank`` is :func:`largest_total`.

    Raises:
        ValueError: the budget is smaller than one module, or the schedule is unknown (:func:`search_steps`).
    """
    total = largest_total(config, space)
    if not total:
        raise ValueError(
            f"method.keep={config.keep:g} of {len(space.ranks)} modules is less than one: raise it, "
            "or adapt more modules"
        )
    return [Event(step, total, step, 1) for step in search_steps(config, total_steps, steps_per_epoch)]
