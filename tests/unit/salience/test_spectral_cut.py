"""The threshold over the singular values of all modules: optimality by enumeration, properties, limits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from salient_ds.salience.spectral_cut import Cut, Spectrum, energy_kept, parameters_of, ranks_to_keep

VALUES = st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 7.0]), max_size=4)
MODULE = st.builds(lambda v, c: Spectrum(tuple(sorted(v, reverse=True)), c), VALUES, st.integers(1, 9))
ADAPTER = st.lists(MODULE, min_size=1, max_size=4).filter(lambda adapter: any(s.values for s in adapter))


def error(spectra: list[Spectrum], ranks: list[int]) -> float:
    """Squared Frobenius norm of what is lost."""
    return math.fsum(v * v for s, rank in zip(spectra, ranks, strict=True) for v in s.values[rank:])


def choices(spectra: list[Spectrum]) -> Iterator[list[int]]:
    """Every combination of ranks."""
    return map(list, product(*(range(len(s.values) + 1) for s in spectra)))


@settings(max_examples=80, deadline=None)
@given(ADAPTER, st.floats(0.1, 5))
def test_no_adapter_of_the_same_total_rank_is_closer(spectra: list[Spectrum], mean: float) -> None:
    budget = math.floor(mean * len(spectra) + 1e-9)
    if budget < 1:
        return
    ranks = ranks_to_keep(spectra, Cut("rank", mean))
    assert sum(ranks) == min(budget, sum(len(s.values) for s in spectra))
    best = min(error(spectra, other) for other in choices(spectra) if sum(other) <= budget)
    assert error(spectra, ranks) == pytest.approx(best)


@settings(max_examples=80, deadline=None)
@given(ADAPTER, st.floats(0.01, 1))
def test_no_adapter_of_the_same_energy_is_smaller(spectra: list[Spectrum], share: float) -> None:
    ranks = ranks_to_keep(spectra, Cut("energy", share))
    assert energy_kept(spectra, ranks) >= share - 1e-12
    fewest = min(sum(other) for other in choices(spectra) if energy_kept(spectra, other) >= share + 1e-12 or
                 error(spectra, other) == 0)  # fmt: skip
    assert sum(ranks) <= fewest
    dropped_one = [energy_kept(spectra, other) for other in choices(spectra) if sum(other) == sum(ranks) - 1]
    assert all(kept < share + 1e-12 for kept in dropped_one)


@settings(max_examples=80, deadline=None)
@given(ADAPTER, st.integers(1, 60))
def test_greedy_by_gain_per_parameter(spectra: list[Spectrum], size: int) -> None:
    """Within the size, nothing that is left out would still fit, and at most one value worse than the best."""
    least = min(s.cost for s in spectra if s.values)
    if size < least:
        with pytest.raises(ValueError, match=f"--parameters {size} is below {least}, the size of one row"):
            ranks_to_keep(spectra, Cut("parameters", size))
        return
    ranks = ranks_to_keep(spectra, Cut("parameters", size))
    used = parameters_of(spectra, ranks)
    assert used <= size
    out = [(s.values[rank], s.cost) for s, rank in zip(spectra, ranks, strict=True) if rank < len(s.values)]
    assert all(used + cost > size for _, cost in out)
    best = min(error(spectra, other) for other in choices(spectra) if parameters_of(spectra, other) <= size)
    allowance = max((value * value for value, _ in out), default=0.0)
    assert error(spectra, ranks) <= best + allowance + 1e-9


@settings(max_examples=60, deadline=None)
@given(ADAPTER, st.integers(1, 5), st.floats(0.01, 1))
def test_uniform(spectra: list[Spectrum], rank: int, share: float) -> None:
    lengths = [len(s.values) for s in spectra]
    assert ranks_to_keep(spectra, Cut("rank", rank, uniform=True)) == [min(rank, n) for n in lengths]
    by_energy = ranks_to_keep(spectra, Cut("energy", share, uniform=True))
    level = max(by_energy)
    assert by_energy == [min(level, n) for n in lengths] and energy_kept(spectra, by_energy) >= share - 1e-12
    if level > 1:
        assert energy_kept(spectra, [min(level - 1, n) for n in lengths]) < share


def test_uniform_within_a_size() -> None:
    spectra = [Spectrum((3.0, 2.0, 1.0), 10), Spectrum((1.0,), 5), Spectrum((), 7)]
    expected = {15: [1, 1, 0], 24: [1, 1, 0], 25: [2, 1, 0], 35: [3, 1, 0], 999: [3, 1, 0]}
    for size, ranks in expected.items():
        assert ranks_to_keep(spectra, Cut("parameters", size, uniform=True)) == ranks
    with pytest.raises(ValueError, match="--parameters 14 is below 15, the size of one row of every module"):
        ranks_to_keep(spectra, Cut("parameters", 14, uniform=True))


@given(ADAPTER)
def test_everything_is_kept_when_the_budget_allows_it(spectra: list[Spectrum]) -> None:
    everything = [len(s.values) for s in spectra]
    size = parameters_of(spectra, everything)
    for cut in (Cut("rank", 4), Cut("rank", 99), Cut("energy", 1), Cut("parameters", size), Cut("parameters", 10**9)):
        for uniform in (False, True):
            assert ranks_to_keep(spectra, Cut(cut.criterion, cut.amount, uniform)) == everything
    assert energy_kept(spectra, everything) == 1


def test_one_threshold_for_all_modules() -> None:
    strong, weak = Spectrum((9.0, 8.0, 7.0), 4), Spectrum((6.0, 1.0), 4)
    assert ranks_to_keep([strong, weak], Cut("rank", 1.5)) == [3, 0]
    assert ranks_to_keep([strong, weak], Cut("rank", 2)) == [3, 1]


def test_a_cheap_value_is_preferred_for_parameters_only() -> None:
    wide, narrow = Spectrum((2.0,), 100), Spectrum((1.0,), 10)
    assert ranks_to_keep([wide, narrow], Cut("rank", 0.5)) == [1, 0]
    assert ranks_to_keep([wide, narrow], Cut("parameters", 105)) == [0, 1]


def test_equal_values_go_to_the_earlier_module() -> None:
    assert ranks_to_keep([Spectrum((1.0, 1.0), 2)] * 3, Cut("rank", 1)) == [2, 1, 0]


def test_full_energy_keeps_what_rounding_would_lose() -> None:
    assert ranks_to_keep([Spectrum((1.0, 1e-12), 2), Spectrum((1e-13,), 2)], Cut("energy", 1)) == [2, 1]


def test_energy_per_module() -> None:
    assert Spectrum((2.0, 1.0), 4).kept(1) == 0.8 and Spectrum((2.0, 1.0), 4).kept(0) == 0
    assert Spectrum((), 4).kept(0) == 1, "a module without an update loses nothing"


@pytest.mark.parametrize(
    ("criterion", "amount", "uniform", "message"),
    [
        ("rank", 0, False, "--rank 0 is not a number above 0"),
        ("rank", -1, False, "--rank -1 is not a number above 0"),
        ("rank", math.nan, False, "--rank nan is not a number above 0"),
        ("rank", math.inf, False, "--rank inf is not a number above 0"),
        ("rank", 1.5, True, "--rank 1.5 is not a whole number: with --uniform"),
        ("energy", 0, False, "--energy 0 is not a number above 0"),
        ("energy", 1.01, False, "--energy 1.01 is above 1"),
        ("energy", 99, True, "--energy 99 is above 1: give the share"),
        ("parameters", 0, False, "--parameters 0 is not a number above 0"),
        ("parameters", 1.5, False, "--parameters 1.5 is not a whole number"),
    ],
)
def test_amounts_out_of_range(criterion, amount: float, uniform: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cut(criterion, amount, uniform)


def test_less_than_a_row_and_an_adapter_that_does_nothing() -> None:
    spectra = [Spectrum((1.0,), 4)] * 10
    with pytest.raises(ValueError, match=r"--rank 0.09 for 10 modules is less than one row: give at least 0.1"):
        ranks_to_keep(spectra, Cut("rank", 0.09))
    assert sum(ranks_to_keep(spectra, Cut("rank", 0.1))) == 1
    with pytest.raises(ValueError, match="the update of all 2 modules is zero"):
        ranks_to_keep([Spectrum((), 4)] * 2, Cut("rank", 1))
