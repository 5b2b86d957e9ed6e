"""Budgets in ranks and in parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from salient_ds.config.run import parse_config
from salient_ds.methods.adalora.options import AdaLoRAConfig
from salient_ds.methods.budget_rule import BudgetRule
from salient_ds.methods.options import TargetConfig
from salient_ds.methods.salientlora.options import SalientLoRAConfig
from salient_ds.methods.spectral.method import Spectral
from salient_ds.methods.spectral.options import SpectralConfig
from salient_ds.ranks import Event, RankLayout, Spectrum, initial_decision
from salient_ds.salience.select import select_within
from salient_ds.strict import ConfigError

LAYOUT = RankLayout(("narrow", "wide"), (4, 4), (10, 30), (10, 50))
"""A row of the narrow matrix has 20 elements, one of the wide matrix 80."""


@given(
    scores=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    costs=st.lists(st.sampled_from([1.0, 4.0, 9.0]), min_size=12, max_size=12),
    budget=st.floats(0, 60),
    dead=st.integers(0, 2**12 - 1),
)
def test_what_fits_is_kept_in_order(scores: list[int], costs: list[float], budget: float, dead: int) -> None:
    score_N, cost_N = torch.tensor(scores).double(), torch.tensor(costs[: len(scores)])
    live_N = torch.tensor([not dead >> i & 1 for i in range(len(scores))])
    kept_N = select_within(score_N, cost_N, budget, live_N)
    left, expected = budget, torch.zeros_like(live_N)
    for row in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if live_N[row] and cost_N[row] <= left:
            expected[row], left = True, left - float(cost_N[row])
    assert torch.equal(kept_N, expected)


def rule_of(**options: Any) -> BudgetRule:
    return BudgetRule(SpectralConfig.model_validate({"budget_unit": "parameters"} | options), LAYOUT)


def test_the_budget_is_that_of_uniform_adapters() -> None:
    """100 elements per pair of rows: one row in each matrix at the end, four at the start."""
    rule = rule_of(target_rank=1)
    assert (rule.allowed(8), rule.allowed(5), rule.allowed(2)) == (400, 250, 100)


def test_one_wide_row_costs_four_narrow_ones() -> None:
    event, live_N = Event(1, 2, 1, 1), torch.ones(8, dtype=torch.bool)
    for unit, expected in (("ranks", [0, 0, 0, 0, 1, 1, 0, 0]), ("parameters", [1, 1, 1, 1, 0, 0, 0, 0])):
        rule = rule_of(target_rank=1, budget_unit=unit)
        gain_N = rule.per_parameter(torch.tensor([3.0, 3, 3, 3, 8, 7, 6, 5]), LAYOUT)
        assert rule.select(gain_N, event, live_N, LAYOUT).int().tolist() == expected


def test_a_method_keeps_a_budget_in_parameters() -> None:
    config = SpectralConfig(target_rank=1, budget_unit="parameters", score="energy")
    method = Spectral(config, LAYOUT, 100)
    sigma_N = torch.tensor([4.0, 3, 2, 1, 9, 2, 1, 1]).double()
    method.take_spectrum(Spectrum(sigma_N, sigma_N))
    found = method.allocate({}, method.events[-1], initial_decision(method.policy, LAYOUT))
    kept = found.ranks(LAYOUT)
    assert kept == [1, 1] and 20 * kept[0] + 80 * kept[1] <= 100
    assert config.event_notes(method.events, 2)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "adalora", "ties": "threshold"}, r"needs method\.ties=exact"),
        ({"name": "salientlora", "preset": "reference"}, r"needs method\.ties=exact and a method\.normalisation"),
        ({"name": "increlora", "top_h": 1}, "works with methods that prune, not with increlora"),
    ],
)
def test_choices_that_cannot_keep_it_are_refused(method: dict[str, Any], message: str) -> None:
    data = {
        "output_dir": "out", "deepspeed": "ds.json", "model": {"path": "m"}, "data": {"train": "d"},
        "adapter": {"rank": 4}, "method": method | {"target_rank": 2, "budget_unit": "parameters"},
        "train": {"max_steps": 1, "global_batch_size": 1, "micro_batch_size": 1, "lr": 1e-3},
    }  # fmt: skip
    with pytest.raises(ConfigError, match=message):
        parse_config(data)


@pytest.mark.parametrize("config", [AdaLoRAConfig, SalientLoRAConfig, SpectralConfig])
def test_ranks_stay_the_default(config: type[TargetConfig]) -> None:
    assert config.model_validate({"target_rank": 2}).budget_unit == "ranks"
