"""The method spectral: its events, what it refuses, what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from salient_ds.methods.spectral.method import Spectral, random_scores
from salient_ds.methods.spectral.options import SpectralConfig
from salient_ds.ranks import Event, RankDecision, RankLayout, Spectrum, initial_decision

LAYOUT = RankLayout(("a", "b"), (4, 4), (6, 8), (6, 5))


def events(total_steps: int = 100, **options: Any) -> list[tuple[int, int]]:
    config = SpectralConfig.model_validate({"target_rank": 1, "score": "curvature"} | options)
    return [(event.step, event.total_rank) for event in config.events(LAYOUT, total_steps)]


def test_one_event_by_fraction_or_step() -> None:
    assert events(prune_at=0.3) == events(prune_at=[30]) == [(30, 2)]


def test_several_events_shrink_by_one_factor() -> None:
    assert events(prune_at=[10, 20]) == [(10, 4), (20, 2)]


def test_gate_fisher_rotates_before_its_window() -> None:
    found = SpectralConfig(target_rank=1, score="gate_fisher", prune_at=[30], window=10).events(LAYOUT, 100)
    assert found == [Event(20, 8, 20, 1), Event(30, 2, 21, 10)]


def test_by_default_a_window_fills_most_of_the_time_between_five_events() -> None:
    found = SpectralConfig(target_rank=1).events(LAYOUT, 100)
    assert [event.step for event in found] == [2, 10, 12, 20, 22, 30, 32, 40, 42, 50]
    assert [event.window for event in found] == [1, 8] * 5
    assert [event.total_rank for event in found] == [8, 6, 6, 5, 5, 3, 3, 3, 3, 2]


@pytest.mark.parametrize(("total_steps", "steps"), [(39, [5, 10, 15, 20]), (16, [4, 8]), (8, [4]), (4, [2])])
def test_short_runs_have_fewer_events(total_steps: int, steps: list[int]) -> None:
    events = SpectralConfig(target_rank=1).events(LAYOUT, total_steps)
    assert [event.step for event in events[1::2]] == steps


@pytest.mark.parametrize("window", [8, 0.08])
def test_a_window_is_a_number_of_steps_or_a_fraction(window: float) -> None:
    found = SpectralConfig(target_rank=1, prune_at=[30], window=window).events(LAYOUT, 100)
    assert [(event.step, event.window) for event in found] == [(22, 1), (30, 8)]


def test_a_window_of_one_step_is_told_from_the_rotation_before_it() -> None:
    method = Spectral(SpectralConfig(target_rank=1), LAYOUT, 4)
    assert [(event.step, method.rotates_at(event)) for event in method.events] == [(1, True), (2, False)]
    assert [step for step in range(1, 5) if method.sums_at(step)] == [2]


def test_no_event_if_nothing_is_to_be_removed() -> None:
    assert events(target_rank=4) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune_at": [20, 10]}, "event at step 10 does not fit between step 20 and the end of training at step 100"),
        ({"prune_at": [200]}, "event at step 200 does not fit"),
        ({"prune_at": [0.0]}, "event at step 0"),
        ({"prune_at": [10.5]}, "neither a whole number of steps nor a fraction"),
        ({"score": "gate_fisher", "prune_at": [10], "window": 10}, r"after a window of 10 steps \(method.window\)"),
        ({"target_rank": 5}, "above the initial total"),
    ],
)
def test_impossible_schedules(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        events(**options)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"method\.prune_at is empty"):
        SpectralConfig(target_rank=1, prune_at=[])


def decide(score: str, sigma_N: list[float], curvature_N: list[float]) -> list[bool]:
    method = Spectral(SpectralConfig.model_validate({"target_total": 3, "score": score, "prune_at": 40}), LAYOUT, 100)
    method.take_spectrum(Spectrum(torch.tensor(sigma_N).double(), torch.tensor(curvature_N).double()))
    found = method.allocate({}, method.events[-1], initial_decision(method.policy, LAYOUT))
    assert found.total == 3
    kept: list[bool] = found.mask_N.tolist()
    return kept


def test_one_threshold_over_all_matrices() -> None:
    sigma, curvature = [9.0, 8, 7, 1, 6, 5, 4, 3], [1.0, 1, 1, 1, 2, 3, 4, 1]
    assert decide("energy", sigma, curvature) == [True, True, True] + [False] * 5
    assert decide("curvature", sigma, curvature) == [False] * 4 + [True, True, True, False]


def test_scores_that_are_not_finite_name_the_matrix() -> None:
    with pytest.raises(ValueError, match=r"scores of rows of 1 matrices \(b\) were not finite at step 40"):
        decide("energy", [1.0] * 7 + [float("nan")], [1.0] * 8)


def control(previous: list[bool], **options: Any) -> list[bool]:
    method = Spectral(
        SpectralConfig.model_validate({"target_rank": 1, "prune_at": 40, "score": "curvature"} | options), LAYOUT, 100
    )
    ones_N = torch.ones(8).double()
    method.take_spectrum(Spectrum(ones_N, torch.tensor([1.0, 3, 2, 1, 9, 7, 8, 6]).double()))
    before = RankDecision(0, sum(previous), torch.tensor(previous))
    kept: list[bool] = method.allocate({}, method.events[-1], before).mask_N.tolist()
    return kept


@pytest.mark.parametrize("unit", ["ranks", "parameters"])
def test_rows_that_compete_in_their_matrix_leave_equal_ranks(unit: str) -> None:
    first, second = [False, True, False, False], [True, False, False, False]
    assert control([True] * 8, compete="in_matrix", budget_unit=unit) == first + second
    gone = [True, False, True, True] + [False, True, True, True]
    assert control(gone, compete="in_matrix", budget_unit=unit) == [False, False, True, False] * 2


def test_a_random_draw_is_the_same_everywhere_and_another_in_every_run() -> None:
    found = control([True] * 8, score="random")
    assert sum(found) == 2 and found == control([True] * 8, score="random")
    one_N = torch.tensor([1.0, 2.0, 3.0])
    assert random_scores(one_N).tolist() != random_scores(one_N * (1 + 1e-6)).tolist()
