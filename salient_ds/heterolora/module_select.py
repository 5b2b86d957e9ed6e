"""Chooses which whole modules are on, from their scores and a budget (HeteroLoRA, arXiv 2406.14956).

Shape legend: M = candidate modules in list order (linear layers first, then shortcuts), m = a subset.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Mode = Literal["off", "combined", "separated"]
Unit = Literal["modules", "params"]


@dataclass(frozen=True)
class Candidates:
    """The modules that can be turned on and off, in a fixed order that is the same on every process."""

    names: tuple[str, ...]
    is_shortcut_M: tuple[bool, ...]
    parameters_M: tuple[int, ...]
    """Number of trainable elements."""

    def __post_init__(self) -> None:
        assert len(self.names) == len(self.is_shortcut_M) == len(self.parameters_M)


@dataclass(frozen=True)
class KeptShare:
    """The budget: how much may be on."""

    share: float
    """In (0, 1]."""
    mode: Mode = "combined"
    """combined: one ranking of all modules. separated: one of linear layers and one of shortcuts. off: linear layers
    are ranked, and all shortcuts stay on."""
    unit: Unit = "modules"
    """What the share counts: modules, as in the reference, or their parameters."""


@dataclass(frozen=True)
class ModuleChoice:
    """The outcome of one selection."""

    mask_M: Tensor
    """bool, CPU; True = on."""
    threshold: float
    """Lowest score that is on: of all modules in combined mode, else of the linear layers. inf if none is on."""
    shortcut_threshold: float
    """The same for shortcuts; NaN unless the mode is "separated"."""
    spent: int
    """Cost of the ranked modules that are on, in the unit of the budget."""
    budget: int
    """The most that they may cost."""


def budgets(candidates: Candidates, share: KeptShare) -> tuple[int, int]:
    """Budgets of linear layers and of shortcuts. In combined mode their sum is the budget of the one ranking.

    In modules, as in the reference: floor(share * number) linear layers, and round(share * number) shortcuts, half to
    even. In parameters: floor(share * number) for both.

    Raises:
        ValueError: the share is not in (0, 1], or is too small for a single module.
    """
    if not 0 < share.share <= 1:
        raise ValueError(f"the share of modules that is on is {share.share:g}: choose one above 0 and at most 1")
    linear, shortcut = _totals(candidates, share.unit)
    bL = math.floor(share.share * linear)
    bS = 0 if share.mode == "off" else _shortcut_budget(share, shortcut)
    smallest = min(candidates.parameters_M) if share.unit == "params" else 1
    if bL + bS < smallest:
        raise ValueError(
            f"a share of {share.share:g} of {linear + shortcut} {share.unit} is less than one module: raise it"
        )
    return bL, bS


def _totals(candidates: Candidates, unit: Unit) -> tuple[int, int]:
    sizes = candidates.parameters_M if unit == "params" else (1,) * len(candidates.names)
    shortcut = sum(n for n, is_shortcut in zip(sizes, candidates.is_shortcut_M, strict=True) if is_shortcut)
    return sum(sizes) - shortcut, shortcut


def _shortcut_budget(share: KeptShare, total: int) -> int:
    return round(share.share * total) if share.unit == "modules" else math.floor(share.share * total)


def select_modules_on(
    score_M: Tensor, candidates: Candidates, share: KeptShare, generator: torch.Generator
) -> ModuleChoice:
    """Turn on the modules with the highest scores within the budgets. Pure except for the generator.

    Args:
        score_M: any float dtype and device; a higher score is more salient.
        generator: a CPU generator that draws among equal scores. One generator serves all events of a run, so its state
            belongs in checkpoints. Separated rankings draw for the linear layers first.

    Raises:
        ValueError: a score is NaN (in the reference it wins), or the share is unusable (:func:`budgets`).
    """
    score_M = _checked(score_M, candidates)
    bL, bS = budgets(candidates, share)
    shortcut_M = torch.tensor(candidates.is_shortcut_M, dtype=torch.bool)
    cost_M = torch.tensor(candidates.parameters_M) if share.unit == "params" else torch.ones(len(score_M)).long()
    if share.mode == "combined":
        mask_M = _ranked(score_M, cost_M, bL + bS, share.unit, generator)
        ranked_M = torch.ones_like(mask_M)
    else:
        mask_M = shortcut_M.clone() if share.mode == "off" else torch.zeros_like(shortcut_M)
        mask_M[~shortcut_M] = _ranked(score_M[~shortcut_M], cost_M[~shortcut_M], bL, share.unit, generator)
        ranked_M = ~shortcut_M
        if share.mode == "separated":
            mask_M[shortcut_M] = _ranked(score_M[shortcut_M], cost_M[shortcut_M], bS, share.unit, generator)
            ranked_M = torch.ones_like(mask_M)
    own_M = ranked_M if share.mode == "combined" else ~shortcut_M
    return ModuleChoice(
        mask_M=mask_M,
        threshold=_lowest(score_M, mask_M & own_M),
        shortcut_threshold=_lowest(score_M, mask_M & shortcut_M) if share.mode == "separated" else math.nan,
        spent=int(cost_M[mask_M & ranked_M].sum()),
        budget=bL + bS,
    )


def _checked(score_M: Tensor, candidates: Candidates) -> Tensor:
    score_M = score_M.detach().to("cpu", torch.float64)
    assert score_M.shape == (len(candidates.names),)
    wrong = [candidates.names[i] for i in score_M.isnan().nonzero().flatten().tolist()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"the score of {', '.join(wrong[:3])}{more} is not a number: modules cannot be ranked by it")
    return score_M


def _ranked(score_m: Tensor, cost_m: Tensor, budget: int, unit: Unit, generator: torch.Generator) -> Tensor:
    if unit == "modules":
        return top_k(score_m, budget, generator)
    return top_within(score_m, cost_m, budget, generator)


def top_k(score_m: Tensor, budget: int, generator: torch.Generator) -> Tensor:
    """The ``budget`` modules with the highest scores, or all if there are fewer. Ties at the cut are drawn.

    This is the rule of the reference, including its use of random numbers. If more than one module has the lowest
    selected score, these modules are permuted at random. The first ones in that order get the places that higher scores
    have left. Differs from the reference: a budget of 0 turns nothing on (there: an assertion), and NaN is not allowed.

    Returns:
        bool (m,), CPU.
    """
    assert not score_m.isnan().any() and budget >= 0
    mask_m = torch.zeros(len(score_m), dtype=torch.bool)
    budget = min(budget, len(score_m))
    if budget == 0:
        return mask_m
    cut = torch.sort(score_m, descending=True).values[budget - 1]
    mask_m |= score_m > cut
    tied = (score_m == cut).nonzero().flatten()
    if len(tied) > 1:
        tied = tied[torch.randperm(len(tied), generator=generator)]
    mask_m[tied[: budget - int(mask_m.sum())]] = True
    return mask_m


def top_within(score_m: Tensor, cost_m: Tensor, budget: int, generator: torch.Generator) -> Tensor:
    """Take modules from the highest score down while their costs fit into ``budget``; skip those that are too large.

    So the total cost never exceeds the budget, and no module that is off would still fit. Equal scores that do not all
    fit are taken in random order. With equal costs c the result is :func:`top_k` with floor(budget / c).

    Returns:
        bool (m,), CPU.
    """
    assert not score_m.isnan().any() and budget >= 0
    mask_m = torch.zeros(len(score_m), dtype=torch.bool)
    left = budget
    for score in torch.unique(score_m).flip(0):
        if left < int(cost_m[~mask_m].min()):
            break
        tied = (score_m == score).nonzero().flatten()
        if len(tied) > 1 and int(cost_m[tied].sum()) >= left:
            tied = tied[torch.randperm(len(tied), generator=generator)]
        for index in tied.tolist():
            if int(cost_m[index]) <= left:
                mask_m[index] = True
                left -= int(cost_m[index])
        if bool(mask_m.all()):
            break
    return mask_m


def _lowest(score_M: Tensor, mask_M: Tensor) -> float:
    return float(score_M[mask_M].min()) if bool(mask_M.any()) else math.inf
