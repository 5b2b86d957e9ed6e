"""Spread, paired intervals and Holm's correction, against scipy and by hand."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from salient_ds.sweep.plan import plan
from salient_ds.sweep.report import compare
from salient_ds.sweep.statistics import holm, paired, spread, t_interval, t_test, with_holm
from tests.unit.sweep.sweep_helpers import by_key, ended, make_spec

VALUES = (0.3, -0.1, 0.25, 0.4, 0.15)


def test_the_interval_by_hand() -> None:
    # mean 0.2, standard deviation sqrt(0.145 / 4), t(0.975, 4) = 2.776445
    half = 2.7764451 * math.sqrt(0.145 / 4) / math.sqrt(5)
    assert t_interval(VALUES) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)


def test_the_interval_and_p_value_of_scipy() -> None:
    test = stats.ttest_rel([1 + v for v in VALUES], [1.0] * 5)
    interval = test.confidence_interval(0.95)
    assert t_interval(VALUES) == pytest.approx((interval.low, interval.high))
    assert t_test(VALUES) == pytest.approx(test.pvalue)


def test_pairs_are_seeds_that_both_have() -> None:
    found = paired("a", "b", {1: 1.0, 2: 2.0, 3: 3.0}, {2: 1.0, 3: 2.5, 4: 9.0})
    assert found is not None
    assert (found.seeds, found.values, found.n, found.mean) == ((2, 3), (1.0, 0.5), 2, 0.75)
    assert paired("a", "b", {1: 1.0}, {2: 1.0}) is None
    one = paired("a", "b", {1: 1.0}, {1: 3.0})
    assert one is not None and (one.low, one.p, one.verdict) == (None, None, "not told apart")


@pytest.mark.parametrize(
    ("shift", "sign", "verdict"),
    [(-1.0, 1, "better"), (-1.0, -1, "worse"), (1.0, 1, "worse"), (1.0, -1, "better"), (0.0, 1, "not told apart")],
)
def test_verdicts(shift: float, sign: int, verdict: str) -> None:
    noise = (0.1, -0.1, 0.05, -0.05)
    found = paired("a", "b", {i: shift + v for i, v in enumerate(noise)}, dict.fromkeys(range(4), 0.0), sign)
    assert found is not None and found.verdict == verdict


def test_equal_differences_have_no_width() -> None:
    same = paired("a", "b", {1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0})
    assert same is not None and (same.low, same.high, same.p, same.verdict) == (1.0, 1.0, 0.0, "worse")
    none = paired("a", "b", {1: 2.0, 2: 3.0}, {1: 2.0, 2: 3.0})
    assert none is not None and (none.p, none.verdict) == (1.0, "not told apart")


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []
    first, second = (
        paired(n, "b", {1: 1.0 + d, 2: 1.2, 3: 1.1}, {1: 0.0, 2: 0.0, 3: 0.0}) for n, d in (("x", 0), ("y", 4))
    )
    assert first is not None and second is not None and first.p is not None and second.p is not None
    adjusted = with_holm([first, second])
    assert [item.p_holm for item in adjusted] == pytest.approx(holm([first.p, second.p]))


def test_spread() -> None:
    found = spread([1.0, 2.0, 6.0])
    assert found is not None and (found.n, found.mean, found.median, found.low, found.high) == (3, 3.0, 2.0, 1.0, 6.0)
    assert found.deviation == pytest.approx(math.sqrt(7.0))
    one = spread([4.0])
    assert spread([]) is None and one is not None and one.deviation is None


def test_runs_of_the_chosen_rate_on_fresh_seeds_are_compared() -> None:
    spec = make_spec(lr=[1e-3, 2e-3], seeds={"tune": [0], "fresh": [1, 2, 3]})
    outcomes = by_key(
        *(ended(arm, lr, 0, loss) for arm in ("lora", "other") for lr, loss in ((1e-3, 2.0), (2e-3, 1.0))),
        *(ended("lora", 2e-3, seed, 1.0 + seed, phase="fresh") for seed in (1, 2, 3)),
        *(ended("other", 2e-3, seed, 0.9 + seed + seed / 100, phase="fresh") for seed in (1, 2)),
        ended("other", 2e-3, 3, status="diverged", phase="fresh"),
        ended("other", 1e-3, 3, -50.0, phase="fresh"),  # of an earlier start, at another rate
    )
    (found,) = compare(spec, plan(spec, outcomes), outcomes)
    assert (found.arm, found.baseline, found.seeds) == ("other", "lora", (1, 2))
    assert found.values == pytest.approx((-0.09, -0.08)) and found.p_holm == found.p
