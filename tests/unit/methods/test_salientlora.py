"""SalientLoRA driven without a model: sharding, resuming, options, and what must not matter.

Shape legend: N = singular values, M = matrices, S = steps of the run.
"""

from __future__ import annotations

import itertools
from typing import Any, get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from salient_ds.methods.salientlora.method import SalientLoRA
from salient_ds.methods.salientlora.options import SalientLoRAConfig, SalientOptions
from salient_ds.ranks import MaskPolicy, RankDecision
from tests.unit.salience.simulated import FakeView, Simulation, layout_of

STEPS = 120
RANKS = (6, 4, 1, 7)
LAYOUT = layout_of(RANKS)
TARGET = 5
# Every row exactly once; matrices are cut anywhere, one process has several views, one has a view without rows.
SHARDS: dict[int, list[list[list[int]]]] = {
    1: [[list(range(18))]],
    2: [[list(range(3)), list(range(14, 18))], [list(range(3, 14)), []]],
    3: [[[17, 16, 0, 1]], [[], list(range(2, 9))], [list(range(9, 16))]],
}


def config_of(**changes: Any) -> SalientLoRAConfig:
    base: dict[str, Any] = {"target_total": TARGET, "score": "salience", "initial_warmup": 7, "final_warmup": 10}
    return SalientLoRAConfig(**base | {"window_initial": 5, "window_final": 30} | changes)


def made_up_run(seed: int = 0, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    """Values (S, N) with common drivers and several scales, norms (S, M, 2)."""
    g = torch.Generator().manual_seed(seed)
    total = LAYOUT.total
    drivers_SK = torch.randn(steps, 4, generator=g).cumsum(0)
    chosen_N = torch.randint(0, 4, (total,), generator=g)
    amplitude_N = torch.exp(1.5 * torch.randn(total, generator=g))
    values_SN = amplitude_N * (drivers_SK[:, chosen_N] + 0.3 * torch.randn(steps, total, generator=g))
    return values_SN, 0.5 + torch.rand(steps, len(RANKS), 2, generator=g)


def simulate(config: SalientLoRAConfig, processes: int = 1, steps: int = STEPS) -> Simulation:
    return Simulation(lambda: SalientLoRA(config, LAYOUT, steps), LAYOUT, SHARDS[processes])


def digests(simulation: Simulation) -> list[str]:
    return [decision.digest() for decision in simulation.decisions]


def cuts(simulation: Simulation) -> list[str]:
    """Score at the cut of every event; as text, because NaN (nothing dropped) differs from itself."""
    return [str(decision.threshold) for decision in simulation.decisions]


def method_of(simulation: Simulation, process: int = 0) -> SalientLoRA:
    method = simulation.processes[process].method
    assert isinstance(method, SalientLoRA)
    return method


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_shards_do_not_matter(preset: str) -> None:
    runs = [simulate(config_of(preset=preset), n).run(*made_up_run()) for n in (1, 2, 3)]
    first = runs[0].decisions
    assert len({d.mask_N.numpy().tobytes() for d in first}) >= 4
    for run in runs[1:]:
        assert digests(run) == digests(runs[0])
        assert cuts(run) == cuts(runs[0])


def test_two_runs_are_equal_and_another_history_is_not() -> None:
    assert digests(simulate(config_of()).run(*made_up_run())) == digests(simulate(config_of()).run(*made_up_run()))
    assert digests(simulate(config_of()).run(*made_up_run(1))) != digests(simulate(config_of()).run(*made_up_run()))


@pytest.mark.parametrize("preset", ["paper", "reference"])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 3), (3, 1), (1, 2)])
def test_resuming_in_a_window_with_other_shards(preset: str, before: int, after: int) -> None:
    config = config_of(preset=preset)
    values_SN, penalties_SM2 = made_up_run()
    whole = simulate(config).run(values_SN, penalties_SM2)
    events = [event.step for event in method_of(whole).events]
    inside = events[1] + (events[2] - events[1]) // 2
    # before the first window, its first steps, inside one, around an event, after the last one
    for cut in (3, 7, 8, 9, inside, events[2] - 1, events[2], events[2] + 1, events[-1] + 1):
        saved = simulate(config, before).run(values_SN[:cut], penalties_SM2[:cut]).save()
        assert bool(saved["stored"]) == bool(saved["shared"]["recorded"]), "only an open window is saved"
        resumed = simulate(config, after).load(saved).run(values_SN, penalties_SM2)
        done = sum(step <= cut for step in events)
        assert digests(resumed) == digests(whole)[done:], f"cut after {cut}"
        assert cuts(resumed) == cuts(whole)[done:], f"cut after {cut}"


def test_resuming_counts_the_leading_loss_of_the_reference() -> None:
    config = config_of(preset="reference", initial_warmup=0)
    values_SN, penalties_SM2 = made_up_run()
    whole = simulate(config).run(values_SN, penalties_SM2)
    for cut in (1, 2, 4):
        saved = simulate(config, 2).run(values_SN[:cut], penalties_SM2[:cut]).save()
        assert len(saved["shared"]["losses_tM2"]) == cut
        assert saved["shared"]["recorded"] == cut - 1
        assert digests(simulate(config, 3).load(saved).run(values_SN, penalties_SM2)) == digests(whole)


def test_resuming_needs_the_recorded_window() -> None:
    """Shows that the tests above can fail: without the first half of the window, another decision is made."""
    values_SN, penalties_SM2 = made_up_run()
    whole = simulate(config_of()).run(values_SN, penalties_SM2)
    cut = method_of(whole).events[2].step - 2
    saved = simulate(config_of()).run(values_SN[:cut], penalties_SM2[:cut]).save()
    for value in saved["stored"].values():
        value.copy_(torch.randn_like(value))
    assert digests(simulate(config_of()).load(saved).run(values_SN, penalties_SM2)) != digests(whole)[2:]


def test_a_checkpoint_of_another_schedule_is_refused() -> None:
    values_SN, penalties_SM2 = made_up_run()
    saved = simulate(config_of()).run(values_SN[:20], penalties_SM2[:20]).save()
    with pytest.raises(ValueError, match="step 20 holds .* resume with the warm-ups, windows"):
        simulate(config_of(initial_warmup=9)).load(saved)


def test_default_preset_ends_at_exactly_the_target() -> None:
    for steps, initial, final, target in itertools.product((40, 133), (0, 3, 0.2), (0, 0.3), (1, 5, 18)):
        config = config_of(target_total=target, initial_warmup=initial, final_warmup=final)
        run = simulate(config, 1, steps).run(*made_up_run(3, steps))
        totals = [decision.total for decision in run.decisions]
        assert totals == [decision.budget for decision in run.decisions]
        assert totals[-1] == target
        assert totals == sorted(totals, reverse=True)


def test_pruned_values_never_return() -> None:
    for preset in ("paper", "reference"):
        run = simulate(config_of(preset=preset)).run(*made_up_run())
        for before, after in itertools.pairwise(run.decisions):
            assert not (after.mask_N & ~before.mask_N).any()


def allocate_third(config: SalientLoRAConfig, change: Any = None) -> tuple[RankDecision, RankDecision]:
    """The third decision of a run, and the one made from a window that ``change`` has edited."""
    run = simulate(config)
    method, (values_SN, penalties_SM2) = method_of(run), made_up_run()
    event = method.events[2]
    run.run(values_SN[: event.step - 1], penalties_SM2[: event.step - 1])
    previous = run.latest
    run.train_step(values_SN[event.step - 1], penalties_SM2[event.step - 1])
    statistics = method.contribution()
    again = method.allocate(statistics, event, previous)
    assert again.digest() == run.latest.digest(), "allocate does not change the method"
    if change is not None:
        change(statistics["window"], previous.mask_N)
    return again, method.allocate(statistics, event, previous)


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_what_became_of_pruned_values_does_not_count(preset: str) -> None:
    def regrow(window_NT: Tensor, live_N: Tensor) -> None:
        assert not live_N.all()
        window_NT[~live_N] = 100 * torch.randn(int((~live_N).sum()), window_NT.shape[1])

    before, after = allocate_third(config_of(preset=preset), regrow)
    assert before.digest() == after.digest()

    def disturb(window_NT: Tensor, live_N: Tensor) -> None:
        window_NT[live_N] = 100 * torch.randn(int(live_N.sum()), window_NT.shape[1])

    before, after = allocate_third(config_of(preset=preset), disturb)
    assert before.digest() != after.digest()


def test_pruned_values_do_not_shift_the_scores_of_the_live_ones() -> None:
    """With leaves at 1 a pruned value would add 1 to the sum of influences if it were ranked."""
    config = config_of(combine="sum")
    before, _ = allocate_third(config)
    as_code, _ = allocate_third(config_of(combine="sum", nan_scores="reference"))
    assert before.threshold != pytest.approx(as_code.threshold, rel=1e-3)


def test_only_the_steps_of_the_window_count() -> None:
    values_SN, penalties_SM2 = made_up_run()
    expected = simulate(config_of()).run(values_SN, penalties_SM2)
    first = method_of(expected).events[0]
    outside_SN, outside_SM2 = values_SN.clone(), penalties_SM2.clone()
    outside_SN[: first.window_start - 1] = float("nan")
    outside_SM2[: first.window_start - 1] = float("nan")
    outside_SN[method_of(expected).events[-1].step :] = float("nan")
    assert digests(simulate(config_of()).run(outside_SN, outside_SM2)) == digests(expected)
    inside_SN = values_SN.clone()
    inside_SN[first.window_start - 1] *= -3
    assert digests(simulate(config_of()).run(inside_SN, penalties_SM2)) != digests(expected)


def test_loss_weights_per_module_and_global() -> None:
    values_SN, penalties_SM2 = made_up_run()
    other_SM2 = penalties_SM2.clone()
    other_SM2[:, 0] = other_SM2[:, 0].flip(0)
    for kind in ("per_module", "global"):
        thresholds = [
            [d.threshold for d in simulate(config_of(loss_weights=kind)).run(values_SN, p_SM2).decisions[:3]]
            for p_SM2 in (penalties_SM2, other_SM2, 7 * penalties_SM2)
        ]
        assert thresholds[0] != pytest.approx(thresholds[1], rel=1e-3), "losses count"
        assert thresholds[0] == pytest.approx(thresholds[2], rel=1e-5), "their scale does not"


def test_memory_is_freed_after_the_event() -> None:
    run = simulate(config_of(), 2)
    values_SN, penalties_SM2 = made_up_run()
    owned = sum(len(rows) for rows in SHARDS[2][0])
    events = method_of(run).events
    for step in range(1, STEPS + 1):
        run.train_step(values_SN[step - 1], penalties_SM2[step - 1])
        current = next((e for e in events if e.window_start <= step <= e.step), None)
        assert method_of(run).window_bytes == (0 if current is None else owned * current.window * 4), step


def test_a_process_without_any_view_takes_part() -> None:
    values_SN, penalties_SM2 = made_up_run()
    lonely = Simulation(lambda: SalientLoRA(config_of(), LAYOUT, STEPS), LAYOUT, [*SHARDS[1], []])
    assert digests(lonely.run(values_SN, penalties_SM2)) == digests(simulate(config_of()).run(values_SN, penalties_SM2))
    saved = lonely.save()
    assert saved["step"] == STEPS


def test_a_value_that_is_not_finite_stops_the_allocation() -> None:
    values_SN, penalties_SM2 = made_up_run()
    values_SN[10, 7] = float("nan")
    with pytest.raises(ValueError, match=r"1 matrices \(layer\.1\) were not finite in steps 8\.\.12"):
        simulate(config_of()).run(values_SN, penalties_SM2)


def test_penalties_are_required_inside_a_window_only() -> None:
    run = simulate(config_of())
    values_SN, penalties_SM2 = made_up_run()
    method, view = method_of(run), FakeView("buffer0", LAYOUT, list(range(18)), values_SN[0])
    method.observe(view, 7)
    method.end_step(7, None)
    method.observe(view, 8)
    with pytest.raises(AssertionError, match="orthogonality norms"):
        method.end_step(8, None)
    assert method.needs_penalty


def test_contribution_is_only_there_at_an_event() -> None:
    run = simulate(config_of()).run(*(t[:9] for t in made_up_run()))
    with pytest.raises(AssertionError, match="right after an event"):
        method_of(run).contribution()


def test_policies() -> None:
    paper, reference = (SalientLoRA(config_of(preset=p), LAYOUT, STEPS).policy for p in ("paper", "reference"))
    assert paper == MaskPolicy(gate_forward=True, zero_vectors=True, zero_moments=True, delay=0)
    assert reference == MaskPolicy(gate_forward=False, zero_vectors=False, zero_moments=False, delay=1)
    mixed = SalientLoRA(config_of(preset="reference", apply_at="now"), LAYOUT, STEPS).policy
    assert mixed == MaskPolicy(gate_forward=False, zero_vectors=False, zero_moments=False, delay=0)


def choices() -> dict[str, tuple[Any, ...]]:
    hints = get_type_hints(SalientOptions)
    found = {name: get_args(hint) for name, hint in hints.items() if get_args(hint)}
    return found | {"leaf_influence": (0, 1), "final_prune": (False, True)}


def test_every_combination_of_options_that_decides_works() -> None:
    """All of them make every decision; wherever ties are exact, the budget is met."""
    deciding = {
        k: v for k, v in choices().items() if k not in ("schedule", "apply_at", "pruned_vectors", "final_prune")
    }
    assert set(deciding) == {
        *("leaf_influence", "combine", "normalisation", "magnitude", "loss_weights", "edges", "ties", "nan_scores"),
    }
    values_SN, penalties_SM2 = made_up_run(steps=30)
    outcomes = set()
    for combination in itertools.product(*deciding.values()):
        options = dict(zip(deciding, combination, strict=True))
        config = config_of(window_final=6, initial_warmup=1, final_warmup=1, **options)
        run = simulate(config, 1, 30).run(values_SN, penalties_SM2)
        for decision in run.decisions:
            assert decision.total == decision.budget or (
                options["ties"] == "threshold" and decision.total < decision.budget
            )
        outcomes.add(tuple(digests(run)))
    assert len(outcomes) > 20


@pytest.mark.parametrize("name", sorted(choices()))
def test_every_option_makes_a_difference(name: str) -> None:
    """Decisions, thresholds, events or the policy change with each single option, from at least one of the presets."""
    values_SN, penalties_SM2 = made_up_run(2)
    values_SN[:, 11:] = 0  # a matrix that is all zero: 0/0 in its shares, and ties
    if name == "edges":
        values_SN[:, 1] = values_SN[:, 0] * (2 - 4e-7)  # a slope just below gamma
    differs = False
    for preset in ("paper", "reference"):
        seen = set()
        for choice in choices()[name]:
            run = simulate(config_of(preset=preset, **{name: choice})).run(values_SN, penalties_SM2)
            seen.add((tuple(digests(run)), tuple(cuts(run)), method_of(run).policy))
        differs |= len(seen) == len(choices()[name])
    assert differs


def test_default_warmups_leave_room_to_learn_and_to_recover() -> None:
    def bounds(preset: str, **chosen: float) -> tuple[int, int]:
        plan = SalientLoRAConfig.model_validate({"target_total": TARGET, "preset": preset} | chosen).plan(LAYOUT, 200)
        return plan.initial_warmup, plan.final_warmup

    assert bounds("standard") == (20, 60)
    assert bounds("paper") == bounds("reference") == (0, 0)
    assert bounds("standard", initial_warmup=0, final_warmup=5) == (0, 5)
