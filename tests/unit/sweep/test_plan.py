"""Which runs a sweep needs next."""

from __future__ import annotations

import json
import math

import pytest

from salient_ds.sweep.plan import Outcome, expected_runs, plan, plan_arm, waiting
from tests.unit.sweep.sweep_helpers import by_key, ended, keys, make_spec


def test_tuning_runs_begin_in_the_middle_of_the_grid() -> None:
    state = plan_arm(make_spec(seeds={"tune": [0, 9], "fresh": [1]}), "lora", {})
    assert [(job.lr, job.seed) for job in state.jobs] == [
        (2e-3, 0),
        (2e-3, 9),
        (1e-3, 0),
        (1e-3, 9),
        (4e-3, 0),
        (4e-3, 9),
    ]
    assert not state.complete and state.chosen is None and state.edge == "unknown"


def losses(*values: float | None, first: float = 1e-3) -> dict[str, Outcome]:
    """Losses of lora at learning rates first, 2 first, 4 first, ...; None: diverged."""
    return by_key(*(ended("lora", first * 2**i, 0, v, status="finished" if v is not None else "diverged")
                    for i, v in enumerate(values)))  # fmt: skip


def test_the_best_rate_goes_on_to_fresh_seeds() -> None:
    state = plan_arm(make_spec(), "lora", losses(3.0, 1.0, 2.0))
    assert (state.chosen, state.edge, state.complete) == (2e-3, "interior", True)
    assert [(job.lr, job.seed) for job in state.jobs if job.phase == "fresh"] == [(2e-3, 1), (2e-3, 2)]


def test_seeds_are_averaged_and_higher_can_be_better() -> None:
    spec = make_spec(seeds={"tune": [0, 1], "fresh": [2]}, lr=[1e-3, 2e-3])
    found = by_key(ended("lora", 1e-3, 0, 1.0), ended("lora", 1e-3, 1, 4.0), ended("lora", 2e-3, 0, 2.0))
    assert plan_arm(spec, "lora", found).scores == {1e-3: 2.5, 2e-3: None}
    found |= by_key(ended("lora", 2e-3, 1, 2.9))
    assert plan_arm(spec, "lora", found).chosen == 2e-3
    higher = make_spec(
        metric={"name": "loss", "better": "higher"}, seeds={"tune": [0, 1], "fresh": [2]}, lr=[1e-3, 2e-3]
    )
    assert plan_arm(higher, "lora", found).chosen == 1e-3


def test_an_optimum_at_an_edge_is_widened_until_it_is_inside() -> None:
    spec = make_spec(widen=3)
    state = plan_arm(spec, "lora", losses(3.0, 2.0, 1.0))
    assert keys(state.jobs)[3:] == ["lora~lr-0.008~seed-0"] and state.jobs[3].phase == "widen"
    state = plan_arm(spec, "lora", losses(3.0, 2.0, 1.0, 0.5))
    assert keys(state.jobs)[3:] == ["lora~lr-0.008~seed-0", "lora~lr-0.016~seed-0"]
    state = plan_arm(spec, "lora", losses(3.0, 2.0, 1.0, 0.5, 0.7))
    assert (state.chosen, state.edge) == (8e-3, "interior")
    down = plan_arm(spec, "lora", losses(1.0, 2.0, 3.0))
    assert down.jobs[3].lr == 5e-4


def test_widening_is_bounded_and_the_edge_is_named() -> None:
    state = plan_arm(make_spec(widen=1), "lora", losses(4.0, 3.0, 2.0, 1.0))
    assert (state.chosen, state.edge, state.complete) == (8e-3, "high edge", True)
    assert plan_arm(make_spec(), "lora", losses(1.0, 3.0, 2.0)).edge == "low edge"
    single = make_spec(lr=[1e-3], widen=3)
    assert plan_arm(single, "lora", losses(1.0)).edge == "one rate"


def test_rates_that_did_not_finish_are_bad_neighbours_but_neighbours() -> None:
    state = plan_arm(make_spec(widen=3), "lora", losses(3.0, 2.0, None))
    assert (state.chosen, state.edge) == (2e-3, "interior")
    all_diverged = plan_arm(make_spec(widen=2), "lora", losses(None, None, None))
    assert all_diverged.jobs[3].lr == 5e-4 and not all_diverged.complete
    failed = by_key(*(ended("lora", lr, 0, status="failed") for lr in (1e-3, 2e-3, 4e-3)))
    state = plan_arm(make_spec(widen=2), "lora", failed)
    assert state.complete and state.chosen is None and len(state.jobs) == 3


def test_a_loss_that_is_not_finite_is_never_best() -> None:
    assert plan_arm(make_spec(), "lora", losses(3.0, math.nan, 4.0)).chosen == 1e-3


def test_tuning_comes_first_and_arms_take_turns() -> None:
    spec = make_spec(lr=[1e-3, 2e-3])
    found = losses(1.0, 2.0)
    jobs = keys(waiting(plan(spec, found), found))
    assert jobs == ["other~lr-0.001~seed-0", "other~lr-0.002~seed-0", "lora~lr-0.001~seed-1", "lora~lr-0.001~seed-2"]
    assert expected_runs(spec, plan(spec, found)) == 2 * 2 + 2 * 2


def test_outcomes_survive_json() -> None:
    outcome = ended("lora", 1e-3, 0, math.nan)
    text = json.dumps(outcome.to_json(), allow_nan=False)
    again = Outcome.from_json(json.loads(text))
    assert math.isnan(again.metrics["loss"]) and again.key == outcome.key and again.trainable == 100
    with pytest.raises(TypeError):
        Outcome.from_json({"metrics": {}, "arm": "lora", "surprise": 1})
