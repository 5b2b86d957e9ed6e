"""Turning whole modules on: budgets are met, ties are drawn, and nothing that is no number gets through."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from salient_ds.heterolora.module_select import Candidates, KeptShare, budgets, select_modules_on, top_k, top_within


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def space(linear: int = 8, shortcuts: int = 6, sizes: list[int] | None = None) -> Candidates:
    names = tuple(f"m.{k}" for k in range(linear + shortcuts))
    marks = (False,) * linear + (True,) * shortcuts
    return Candidates(names, marks, tuple(sizes or [10] * (linear + shortcuts)))


def random_scores(count: int, seed: int, levels: int = 5) -> Tensor:
    """With many ties."""
    return torch.randint(0, levels, (count,), generator=seeded(seed)).double() / levels


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [1, 7, 40])
def test_top_k_is_exact_and_takes_the_highest(count: int, seed: int) -> None:
    score = random_scores(count, seed)
    for budget in range(count + 3):
        mask = top_k(score, budget, seeded(seed))
        assert int(mask.sum()) == min(budget, count)
        if mask.any() and not mask.all():
            assert score[mask].min() >= score[~mask].max()


def test_ties_are_drawn_evenly_and_the_draw_goes_on() -> None:
    generator, hits = seeded(3), torch.zeros(6)
    score = torch.tensor([1.0, 2, 1, 1, 0, 1])
    for _ in range(2000):
        hits += top_k(score, 3, generator)
    assert hits[1] == 2000
    assert hits[4] == 0
    assert (hits[[0, 2, 3, 5]] - 1000).abs().max() < 120
    a, b = seeded(3), seeded(3)
    first = [top_k(score, 3, a).tolist() for _ in range(20)]
    assert [top_k(score, 3, b).tolist() for _ in range(20)] == first
    assert any(mask != first[0] for mask in first)


def test_the_state_of_the_generator_is_all_that_is_remembered() -> None:
    """As a checkpoint does it: the state saved before an event gives the same event again."""
    score, generator = torch.ones(12), seeded(1)
    top_k(score, 4, generator)
    state = generator.get_state()
    expected = top_k(score, 4, generator)
    other = torch.Generator()
    other.set_state(state)
    assert torch.equal(top_k(score, 4, other), expected)


def test_without_ties_nothing_is_drawn() -> None:
    generator = seeded(1)
    state = generator.get_state()
    top_k(torch.arange(9.0), 4, generator)
    top_k(torch.tensor([1.0, 1, 3, 2]), 2, generator)  # the tie is below the cut
    assert torch.equal(generator.get_state(), state)
    top_k(torch.tensor([1.0, 3, 3, 2]), 2, generator)  # at the cut, even though both stay: as the reference
    assert not torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("seed", range(30))
def test_top_within_never_exceeds_and_leaves_no_room(seed: int) -> None:
    score = random_scores(25, seed, 1000 if seed % 2 else 4)
    cost = torch.randint(1, 30, (25,), generator=seeded(seed + 100))
    for budget in (0, 1, 17, 60, 200, int(cost.sum()) - 1, int(cost.sum()), 10**6):
        mask = top_within(score, cost, budget, seeded(seed))
        spent = int(cost[mask].sum())
        assert spent <= budget
        if not mask.all():
            assert spent + int(cost[~mask].min()) > budget
            # whoever is on although a higher score is off is there because the higher one did not fit any more
            for k in (~mask).nonzero().flatten().tolist():
                assert int(cost[k]) > budget - int(cost[mask & (score > score[k])].sum()) - int(
                    cost[mask & (score == score[k])].sum()
                )


@pytest.mark.parametrize("seed", range(10))
def test_equal_costs_are_a_number_of_modules(seed: int) -> None:
    score = random_scores(20, seed)
    for budget in (0, 7, 40, 99, 139, 140, 200):
        mask = top_within(score, torch.full((20,), 7), budget, seeded(seed))
        assert torch.equal(mask, top_k(score, budget // 7, seeded(seed)))


@pytest.mark.parametrize("mode", ["combined", "separated", "off"])
@pytest.mark.parametrize("unit", ["modules", "params"])
@pytest.mark.parametrize("share", [0.1, 0.25, 0.33, 0.5, 1.0])
def test_budgets_are_met(mode: Any, unit: Any, share: float) -> None:
    generator = seeded(5)
    candidates = space(16, 11)
    bL, bS = budgets(candidates, KeptShare(share, mode, unit))
    scale = 10 if unit == "params" else 1
    for seed in range(10):
        choice = select_modules_on(random_scores(27, seed), candidates, KeptShare(share, mode, unit), generator)
        linear, shortcut = int(choice.mask_M[:16].sum()), int(choice.mask_M[16:].sum())
        assert choice.budget == bL + bS
        if mode == "combined":
            assert linear + shortcut == (bL + bS) // scale
            assert choice.spent == (linear + shortcut) * scale
        else:
            assert linear == bL // scale
            assert shortcut == (11 if mode == "off" else bS // scale)
            assert choice.spent == (linear + (0 if mode == "off" else shortcut)) * scale


def test_numbers_of_the_released_settings() -> None:
    """OPT-350M and LLaMA-7B with queries and values: 12 + 24 of 143 modules, 21 + 42 of 191."""
    assert budgets(space(48, 95), KeptShare(0.25)) == (12, 24)
    assert budgets(space(64, 127), KeptShare(0.33)) == (21, 42)
    assert budgets(space(48, 95), KeptShare(0.25, "off")) == (12, 0)
    assert budgets(space(10, 10), KeptShare(0.25)) == (2, 2)  # 2.5 is rounded to even
    assert budgets(space(2, 2, [100, 30, 7, 7]), KeptShare(0.5, unit="params")) == (65, 7)


def test_modes_rank_what_they_say() -> None:
    score = torch.tensor([5.0, 4, 3, 2, 9, 8, 7, 6])
    candidates = space(4, 4)
    modes: tuple[Any, ...] = ("combined", "separated", "off")
    found = {mode: select_modules_on(score, candidates, KeptShare(0.5, mode), seeded()) for mode in modes}
    assert found["combined"].mask_M.tolist() == [False] * 4 + [True] * 4
    assert found["separated"].mask_M.tolist() == [True, True, False, False] * 2
    assert found["off"].mask_M.tolist() == [True, True, False, False] + [True] * 4
    assert (found["combined"].threshold, found["separated"].threshold, found["off"].threshold) == (6, 4, 4)
    assert found["separated"].shortcut_threshold == 8
    assert math.isnan(found["combined"].shortcut_threshold)
    assert math.isnan(found["off"].shortcut_threshold)


def test_parameters_count_and_not_modules() -> None:
    """A budget in parameters takes many small modules where one in modules takes few large ones."""
    sizes = [1000] * 4 + [10] * 4
    score = torch.arange(8.0).flip(0)
    by_module = select_modules_on(score, space(4, 4, sizes), KeptShare(0.5), seeded())
    by_size = select_modules_on(score, space(4, 4, sizes), KeptShare(0.5, unit="params"), seeded())
    assert by_module.mask_M.tolist() == [True] * 4 + [False] * 4
    assert by_size.mask_M.tolist() == [True, True, False, False, True, True, False, False]
    assert (by_size.spent, by_size.budget) == (2020, 2020)


def test_scores_of_any_kind_of_float() -> None:
    score = torch.tensor([0.5, 0.25, 0.125, 1.0], dtype=torch.bfloat16, requires_grad=True)
    choice = select_modules_on(score, space(2, 2), KeptShare(0.5), seeded())
    assert choice.mask_M.tolist() == [True, False, False, True]
    assert choice.mask_M.dtype == torch.bool


def test_scores_that_are_no_numbers() -> None:
    score = torch.tensor([1.0, math.nan, 2, 3, math.nan, 1, math.nan, math.nan])
    with pytest.raises(ValueError, match=r"score of m.1, m.4, m.6 and 1 more is not a number"):
        select_modules_on(score, space(4, 4), KeptShare(0.5), seeded())
    infinite = torch.tensor([1.0, math.inf, 2, -math.inf])
    choice = select_modules_on(infinite, space(2, 2), KeptShare(0.5), seeded())
    assert choice.mask_M.tolist() == [False, True, True, False]


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, math.nan])
def test_impossible_shares(share: float) -> None:
    with pytest.raises(ValueError, match="choose one above 0 and at most 1"):
        budgets(space(), KeptShare(share))


@pytest.mark.parametrize(("unit", "sizes"), [("modules", [10] * 14), ("params", [10] * 13 + [9])])
def test_shares_below_one_module(unit: Any, sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="is less than one module: raise it"):
        select_modules_on(torch.rand(14), space(8, 6, sizes), KeptShare(0.02, unit=unit), seeded())
