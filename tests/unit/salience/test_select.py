"""Selection: the budget is met exactly, ties go to the lower row, and the reference rule does what it does."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import Tensor

from salient_ds.salience.select import reference_threshold, score_at_cut, select_exact, select_threshold

NAN, INF = float("nan"), float("inf")


def kept(mask_N: Tensor) -> list[int]:
    return mask_N.nonzero().flatten().tolist()


def test_ties_go_to_the_lower_row() -> None:
    score_N = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 0.0])
    live_N = torch.ones(6, dtype=torch.bool)
    assert [kept(select_exact(score_N, k, live_N)) for k in range(7)] == [
        [],
        [1],
        [1, 3],
        [0, 1, 3],
        [0, 1, 2, 3],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5],
    ]


def test_many_ties_stay_in_order() -> None:
    mask_N = select_exact(torch.zeros(5000), 1234, torch.ones(5000, dtype=torch.bool))
    assert kept(mask_N) == list(range(1234))


def test_pruned_values_never_return() -> None:
    score_N = torch.tensor([9.0, 1.0, 8.0, 2.0])
    live_N = torch.tensor([False, True, False, True])
    assert kept(select_exact(score_N, 1, live_N)) == [3]
    assert kept(select_exact(score_N, 3, live_N)) == [1, 3], "a budget above the live ones keeps them all"
    worst_N = torch.tensor([9.0, -INF, 8.0, NAN])
    assert kept(select_exact(worst_N, 2, live_N)) == [1, 3]
    assert kept(select_exact(worst_N, 1, live_N)) == [1]


def test_equals_a_plain_sort() -> None:
    dice = random.Random(0)
    for _ in range(200):
        count = dice.randint(1, 40)
        scores = [dice.choice([0.0, -0.0, 1.0, 2.0, -INF, dice.random()]) for _ in range(count)]
        live = [dice.random() < 0.7 for _ in range(count)]
        budget = dice.randint(0, count)
        expected = sorted((-scores[i], i) for i in range(count) if live[i])[:budget]
        found = select_exact(torch.tensor(scores), budget, torch.tensor(live))
        assert kept(found) == sorted(i for _, i in expected)


def test_reference_rule_drops_everything_tied_with_the_threshold() -> None:
    score_N = torch.tensor([3.0, 1.0, 1.0, 2.0, 1.0])
    assert reference_threshold(score_N, 3) == 1
    assert kept(select_threshold(score_N, 3)) == [0, 3]
    assert kept(select_threshold(score_N, 4)) == [0, 3]
    assert kept(select_threshold(score_N, 5)) == [0, 1, 2, 3, 4]
    assert kept(select_threshold(score_N, 0)) == []


def test_reference_rule_counts_nan_as_largest_and_masks_it() -> None:
    score_N = torch.tensor([NAN, 1.0, 4.0, NAN, 2.0, 3.0])
    assert kept(select_threshold(score_N, 4)) == [2, 5], "two of four places are lost"
    assert kept(select_threshold(score_N, 2)) == []
    assert math.isnan(reference_threshold(score_N, 1))
    assert kept(select_threshold(score_N, 1)) == []


def test_score_at_the_cut() -> None:
    score_N = torch.tensor([5.0, 9.0, 3.0, 4.0])
    live_N = torch.tensor([True, False, True, True])
    assert score_at_cut(score_N, select_exact(score_N, 1, live_N), live_N) == 4
    assert math.isnan(score_at_cut(score_N, select_exact(score_N, 3, live_N), live_N))


def test_a_negative_budget_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        select_exact(torch.zeros(2), -1, torch.ones(2, dtype=torch.bool))
