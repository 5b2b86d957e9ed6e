"""AdaLoRA: shards, revival, the final phase, checkpoints, and the moment at which sensitivity is taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from salient_ds.methods.adalora.method import AdaLoRA
from salient_ds.methods.adalora.options import AdaLoRAConfig
from salient_ds.ranks import RankDecision, RankLayout
from tests.unit.methods.replay import Replay, Values, random_run, svd_factors

LAYOUT = RankLayout(("q", "v", "up"), (4, 4, 4), (6, 5, 7), (5, 6, 9))
STEPS = 24
BASE = {"target_rank": 2, "initial_warmup": 4, "final_warmup": 6, "interval": 3}
RUN = random_run(svd_factors(LAYOUT), STEPS, seed=3)


def replay_of(pieces: int = 1, **options: Any) -> Replay:
    config = AdaLoRAConfig(**(BASE | options))
    return Replay(lambda: config.build(LAYOUT, STEPS), LAYOUT, svd_factors(LAYOUT), pieces)


def run(replay: Replay, until: int = STEPS) -> Replay:
    while replay.step < until:
        replay.train_step(*RUN[replay.step])
    return replay


def digests(replay: Replay) -> list[str]:
    return [decision.digest() for decision in replay.decisions]


@pytest.mark.parametrize("moment", ["reference", "paper"])
@pytest.mark.parametrize("pieces", [2, 3, 5, 11])
def test_sharded_equals_unsharded(pieces: int, moment: str) -> None:
    whole, cut = run(replay_of(1, moment=moment)), replay_of(pieces, moment=moment)
    assert any(part.lo % part.shape[-1] for view in cut.views for part in view.parts)  # rows are cut
    run(cut)
    assert len(whole.decisions) == 5 and digests(cut) == digests(whole)
    for a, b in zip(whole.scores, cut.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.parametrize("moment", ["reference", "paper"])
def test_two_runs_are_bitwise_equal(moment: str) -> None:
    first, second = run(replay_of(3, moment=moment)), run(replay_of(3, moment=moment))
    assert all(torch.equal(a, b) for a, b in zip(first.scores, second.scores, strict=True))
    assert torch.equal(first.values_P, second.values_P)


@pytest.mark.parametrize("moment", ["reference", "paper"])
def test_the_moment(moment: str) -> None:
    """Weight after the step, or the one that the gradient belongs to, with the same gradient."""
    replay = run(replay_of(moment=moment), until=3)
    assert replay.methods[0].needs_before == (moment == "paper")
    at = (1, "B")
    mean = torch.zeros(LAYOUT.out_features[1], LAYOUT.ranks[1])
    weights = [torch.zeros_like(mean), *(values[at] for values, _ in RUN)]
    for step in range(3):
        weight = weights[step] if moment == "paper" else weights[step + 1]
        mean = 0.85 * mean + 0.15 * (weight * RUN[step][1][at]).abs()
    torch.testing.assert_close(replay.statistics()["sensitivity"][at], mean)


def test_dropped_values_may_return_until_the_last_event() -> None:
    replay = replay_of()
    returned, regrown = 0, 0
    while replay.step < STEPS:
        before = replay.in_force
        after = replay.train_step(*RUN[replay.step])
        sigma_N = torch.cat([after[k, "E"] for k in range(3)])
        regrown += int((~before.mask_N & (sigma_N != 0)).sum())
        returned += int((~before.mask_N & replay.in_force.mask_N).sum())
        if replay.in_force.step == replay.step:
            assert not sigma_N[~replay.in_force.mask_N].any()
        if before.hold and before.step:
            assert torch.equal(sigma_N == 0, ~before.mask_N)
    assert returned > 0 and regrown > 10
    final = replay.decisions[-1]
    assert (final.step, final.total, final.budget, final.hold) == (19, 6, 6, True)
    assert [d.hold for d in replay.decisions[:-1]] == [False] * 4


def test_frozen_scores_in_the_final_phase() -> None:
    """What happens between the end of the phase and the last event does not count."""
    replay, other = (run(replay_of(interval=5), until=18) for _ in range(2))
    replay.train_step(*RUN[18])
    huge = {at: 1e6 * grad for at, grad in RUN[18][1].items()}
    other.train_step(RUN[18][0], huge)
    replay.train_step(*RUN[19])
    other.train_step(*RUN[19])
    assert replay.decisions[-1].step == 20 and replay.decisions[-1].hold
    assert digests(replay) == digests(other)


def test_statistics_are_freed_after_the_last_event() -> None:
    replay = run(replay_of(), until=19)
    method = replay.methods[0]
    assert isinstance(method, AdaLoRA)
    elements = sum(f.numel for f in svd_factors(LAYOUT))
    assert method.state_bytes == 2 * 4 * elements
    assert replay.statistics() == {}  # nothing that a checkpoint would need
    run(replay)
    assert method.state_bytes == 0


def test_equal_scores_keep_the_lower_rows() -> None:
    replay = replay_of()
    for values, _ in RUN:
        replay.train_step(values, {at: torch.zeros_like(v) for at, v in values.items()})
    assert [d.total for d in replay.decisions] == [d.budget for d in replay.decisions]
    assert replay.decisions[-1].mask_N.tolist() == [True] * 6 + [False] * 6
    strict = replay_of(ties="threshold")
    for values, _ in RUN:
        strict.train_step(values, {at: torch.zeros_like(v) for at, v in values.items()})
    assert {d.total for d in strict.decisions} == {0}


def test_ties_do_not_depend_on_how_sums_are_split() -> None:
    """Two matrices with equal weights and gradients: whoever owns what, the earlier one wins."""
    layout = RankLayout(("a", "b"), (4, 4), (37, 37), (29, 29))
    factors = svd_factors(layout)
    steps = random_run(factors[:3], STEPS, seed=0)
    twice = [tuple(v | {(1, f): t for (_, f), t in v.items()} for v in pair) for pair in steps]
    config = AdaLoRAConfig(**(BASE | {"target_total": 5, "target_rank": None}))
    kept = set()
    for pieces in (1, 2, 3, 5, 8):
        replay = Replay(lambda: config.build(layout, STEPS), layout, factors, pieces)
        for values, grads in twice:
            replay.train_step(values, grads)
        kept.add(tuple(replay.decisions[-1].ranks(layout)))
    assert kept == {(3, 2)}


@pytest.mark.parametrize("moment", ["reference", "paper"])
@pytest.mark.parametrize("stop", [0, 2, 7, 9, 17, 18, 19, 21])
def test_resume_on_other_shards(stop: int, moment: str) -> None:
    whole = run(replay_of(2, moment=moment))
    saved = run(replay_of(3, moment=moment), until=stop).save()
    again = run(replay_of(5, moment=moment).load(saved))
    expected = [d.digest() for d in whole.decisions if d.step > stop]
    assert digests(again) == expected
    assert torch.equal(again.values_P, whole.values_P)


def test_resume_into_a_schedule_that_still_needs_statistics() -> None:
    saved = run(replay_of(), until=20).save()
    with pytest.raises(ValueError, match=r"step 20 was saved after the last allocation .* up to step 22"):
        replay_of(final_warmup=3).load(saved)


def test_scores_that_are_not_finite() -> None:
    replay = run(replay_of(), until=6)
    values, grads = RUN[6]
    broken: Values = {at: g.clone() for at, g in grads.items()}
    broken[1, "A"][2, 1] = float("inf")
    with pytest.raises(ValueError, match=r"1 matrices \(v\) were not finite at step 7"):
        replay.train_step(values, broken)


def test_initial_rank_equal_to_the_target_prunes_and_observes_nothing() -> None:
    replay = run(replay_of(target_rank=4), until=10)
    assert replay.methods[0].events == [] and replay.decisions == []
    method = replay.methods[0]
    assert isinstance(method, AdaLoRA) and method.state_bytes == 0
    assert replay.save()["shared"] == {"step": 10, "saved": False}
    run(replay_of(target_rank=4).load(replay.save()))


def test_a_decision_depends_on_its_arguments_only() -> None:
    replay = run(replay_of(), until=7)
    event, statistics = replay.methods[0].events[0], {"score": replay.scores[0]}
    everything = RankDecision(0, 12, torch.ones(12, dtype=torch.bool))
    nothing = RankDecision(0, 0, torch.zeros(12, dtype=torch.bool), hold=False)
    other = AdaLoRAConfig(**BASE).build(LAYOUT, STEPS)
    for method in (replay.methods[0], other):
        for previous in (everything, nothing):
            made = method.allocate(statistics, event, previous)
            assert made.digest() == replay.decisions[0].digest()


def test_schedule_errors_reach_the_user() -> None:
    with pytest.raises(ValueError, match="takes all of total_steps=24"):
        AdaLoRAConfig(target_rank=2, initial_warmup=20, final_warmup=4).build(LAYOUT, STEPS)
