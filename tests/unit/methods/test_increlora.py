"""IncreLoRA: who grows and by how much, what is refused, and the learning rates of rows that join late."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.optimization import get_scheduler

from salient_ds.methods.duties import ScoringMethod
from salient_ds.methods.increlora.growth import grow_exact, grow_threshold, growth_events
from salient_ds.methods.increlora.method import IncreLoRA
from salient_ds.methods.increlora.options import IncreLoRAConfig
from salient_ds.methods.increlora.row_rates import NEVER, RowRates, Run, row_pieces, runs_of
from salient_ds.methods.lora.options import LoRAConfig
from salient_ds.ranks import Part, RankDecision, RankLayout, initial_decision
from salient_ds.salience.learning_rate import RatePlan
from tests.support.layouts import layout_of
from tests.unit.methods.replay import ShardView, svd_factors, uneven_cuts

LAYOUT = RankLayout(("q", "v", "up"), (5, 5, 5), (6, 5, 7), (5, 6, 9))
STEPS = 24
BASE: dict[str, Any] = {"target_total": 9, "interval": 4, "top_h": 2, "add": 2}
RATES = RatePlan("linear", 3, STEPS, (0.9, 0.999), 0.0)


def method_of(rates: RatePlan = RATES, **options: Any) -> IncreLoRA:
    method = IncreLoRAConfig(**BASE | options).build(LAYOUT, STEPS, rates)
    assert isinstance(method, IncreLoRA) and isinstance(method, ScoringMethod)
    return method


def scores_at(step: int) -> Tensor:
    return torch.rand(3, generator=torch.Generator().manual_seed(step)).double()


def play(method: IncreLoRA, decision: RankDecision, steps: range) -> list[RankDecision]:
    """Scores and events of ``steps``; decisions that were taken."""
    taken = []
    for step in steps:
        if method.scored_at(step):
            method.take_scores(scores_at(step), step)
        method.end_step(step, None)
        for event in method.events:
            if event.step == step:
                taken.append(method.allocate(method.contribution(), event, taken[-1] if taken else decision))
    return taken


def test_grows_to_the_target() -> None:
    method = method_of()
    start = initial_decision(method.policy, LAYOUT)
    assert start.ranks(LAYOUT) == [1, 1, 1] and not start.hold
    decisions = play(method, start, range(1, STEPS + 1))
    assert [(d.step, d.total, d.hold) for d in decisions] == [(5, 7, False), (9, 9, True)]
    for before, after in pairwise([start, *decisions]):
        assert bool((after.mask_N | ~before.mask_N).all())  # growth is permanent
        for mask in after.mask_N.split(5):
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)  # rows in order
    assert not method.scored_at(10)


def test_the_last_round_gives_what_is_left() -> None:
    assert grow_exact([0.1, 0.9, 0.5], [4, 4, 4], 3, 2).rows == (0, 2, 1)
    assert grow_exact([0.1, 0.9, 0.5], [4, 4, 4], 3, 2).threshold == 0.5
    assert grow_exact([0.5, 0.5, 0.5], [4, 4, 4], 2, 1).rows == (1, 1, 0)  # ties: the earlier matrix
    assert grow_exact([0.1, 0.9, 0.5], [4, 1, 4], 4, 2).rows == (1, 1, 2)  # full: the next one takes the rest
    assert grow_exact([0.1, 0.9, 0.5], [0, 0, 4], 4, 2).rows == (0, 0, 4)  # round again
    assert grow_threshold([0.5, 0.9, 0.5, 0.1], 2, 3).rows == (3, 3, 3, 0)


@pytest.mark.parametrize("seed", range(5))
def test_totals_are_known_even_where_rows_run_out(seed: int) -> None:
    """Three matrices of five rows, nearly all used: every event's total is the one that was announced."""
    method = method_of(target_total=14, add=3, top_h=1, interval=3)
    decision = initial_decision(method.policy, LAYOUT)
    draw = torch.Generator().manual_seed(seed)
    for event in method.events:
        method.take_scores(torch.rand(3, generator=draw), event.step)
        decision = method.allocate({}, event, decision)
        assert decision.total == event.total_rank == decision.budget and max(decision.ranks(LAYOUT)) <= 5
    assert decision.total == 14


def test_events_after_an_early_end_do_nothing() -> None:
    method = method_of(ties="threshold", add=1, target_total=9)
    assert [e.total_rank for e in method.events] == [5, 7, 9]
    decision = initial_decision(method.policy, LAYOUT)
    for event in method.events[:2]:
        method.take_scores(torch.ones(3), event.step)
        decision = method.allocate({}, event, decision)
    assert decision.total == 9 and decision.hold and not method.scored_at(method.events[2].step)
    assert method.allocate({}, method.events[2], decision) is decision


def test_no_event_if_the_target_is_the_start() -> None:
    method = method_of(target_total=3)
    assert method.events == [] and not method.scored_at(1)
    assert all(rows == [0] + [NEVER] * 4 for rows in method.shared_state()["vectors_joined"])


def test_scored_steps() -> None:
    method = method_of(score_every=4)
    assert [step for step in range(1, STEPS) if method.scored_at(step)] == [1, 5, 9]
    assert all(method_of().scored_at(step) for step in range(1, 10))
    assert not isinstance(LoRAConfig().build(LAYOUT, STEPS), ScoringMethod)


REFUSED = [
    ({"target_total": 16}, r"target total rank 16 lies outside 3\.\.15"),
    ({"target_total": 2}, r"target total rank 2 lies outside 3\.\.15"),
    ({"start_rank": 6, "target_total": 15}, "method.start_rank=6 is above adapter.rank=5"),
    ({"top_h": 4}, "method.top_h=4 is above the 3 adapted matrices"),
    ({"interval": 12, "top_h": 1}, "1 growth events .* only reach a sum of ranks of 5, below the target 9"),
    ({"interval": 24}, "0 growth events"),
    ({"initial_warmup": 20}, "0 growth events"),
    ({"ties": "threshold", "add": 1, "top_h": 1, "interval": 2}, "adapter.rank=5 is too little .* to rank 7"),
    ({"add": None}, "method.add has no default for a mean target rank of 3 "),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method_of(**options)


def test_refused_before() -> None:
    with pytest.raises(ValueError, match="exactly one of method.target_rank"):
        IncreLoRAConfig(top_h=2)
    with pytest.raises(ValueError, match="method.score_reduction=exact .* 4 micro-batches"):
        IncreLoRAConfig(top_h=2, target_rank=2, score_reduction="exact").exact_scores(4)


def test_scores_are_exact_where_that_is_affordable() -> None:
    def exact_scores(kind: Any, accumulation: int) -> bool:
        return IncreLoRAConfig(top_h=2, target_rank=2, score_reduction=kind).exact_scores(accumulation)

    assert IncreLoRAConfig(top_h=2, target_rank=2).score_reduction == "auto"
    found = {(kind, count): exact_scores(kind, count) for kind in ("auto", "mean") for count in (1, 4)}
    assert found == {("auto", 1): True, ("auto", 4): False, ("mean", 1): False, ("mean", 4): False}
    assert exact_scores("exact", 1)
    method = method_of()
    for accumulation in (1, 4):
        method.choose_reduction(accumulation)
        assert method.exact_scores == (accumulation == 1)


def test_schedule_for_check() -> None:
    config = IncreLoRAConfig(target_rank=4, top_h=3, interval=2, initial_warmup=0.25)
    layout = layout_of((5, 5, 5))
    plan = config.plan(layout, STEPS)
    assert (plan.initial_total, plan.target_total) == (3, 12)
    assert (config.initial_total(layout), config.final_total(layout, STEPS)) == (3, 12)
    events = config.events(layout, STEPS)
    assert events == growth_events(plan)
    assert [(e.step, e.total_rank) for e in events] == [(9, 9), (11, 12)]  # s = 8 is the first even one above 6
    assert plan.initial_warmup == 6


def test_scores_that_are_not_finite() -> None:
    method = method_of()
    method.take_scores(torch.tensor([1.0, float("nan"), 1.0]), 1)
    with pytest.raises(ValueError, match=r"scores of 1 matrices \(v\) were not finite at step 5"):
        method.allocate({}, method.events[0], initial_decision(method.policy, LAYOUT))


@pytest.mark.parametrize("stop", range(STEPS))
def test_resume(stop: int) -> None:
    whole = method_of()
    start = initial_decision(whole.policy, LAYOUT)
    expected = play(whole, start, range(1, STEPS + 1))
    first, second = method_of(), method_of()
    head = play(first, start, range(1, stop + 1))

    def nothing(name: str, part: Part) -> Tensor:
        raise AssertionError("there are no shards")

    second.load_state(first.shared_state(), nothing)
    found = head + play(second, head[-1] if head else start, range(stop + 1, STEPS + 1))
    assert [d.digest() for d in found] == [d.digest() for d in expected]
    assert second.shared_state() == whole.shared_state()
    assert second._row_rates._runs == whole._row_rates._runs


def test_when_rows_joined() -> None:
    """E from the event that activates a row, its vectors from the event that takes it into reserve."""
    method = method_of(target_total=8, add=1, top_h=1)
    decision = initial_decision(method.policy, LAYOUT)
    for score, event in zip(([1, 0, 0], [2, 0, 0], [0, 9, 0]), method.events, strict=False):
        method._smoothed.sensitivity[0][:] = torch.tensor(score)
        method._smoothed.uncertainty[0][:] = 1
        decision = method.allocate({}, event, decision)
    state = method.shared_state()
    assert decision.ranks(LAYOUT) == [3, 2, 1]
    assert state["sigma_joined"] == [[0, 5, 9, NEVER, NEVER], [0, 13, *[NEVER] * 3], [0, *[NEVER] * 4]]
    assert state["vectors_joined"] == [[0, 0, 5, 9, NEVER], [0, 0, 13, NEVER, NEVER], [0, 0, *[NEVER] * 3]]
    late = method_of(target_total=8, add=1, top_h=1, advance_learning=False)
    late.allocate({}, late.events[0], initial_decision(late.policy, LAYOUT))
    state = late.shared_state()
    assert state["sigma_joined"] == state["vectors_joined"] and state["vectors_joined"][0] == [0, 5] + [NEVER] * 3
    assert late.policy.start_sigma is None and method.policy.start_sigma == 1e-5


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_rates_are_those_of_the_scheduler(schedule: Any, warmup: int) -> None:
    plan = RatePlan(schedule, warmup, 30, (0.9, 0.999), 0.0)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    scheduler = get_scheduler(name, optimizer, warmup, 30)
    for step in range(1, 31):
        assert plan.rate(step) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        assert plan.restart(step, 0) == (1 if plan.rate(step) else 0)
        optimizer.step()
        scheduler.step()


def test_runs() -> None:
    assert runs_of([0, 0, 5, 5, 9, NEVER]) == [Run(2, 4, 5), Run(4, 5, 9), Run(5, 6, NEVER)]
    assert runs_of([0, 0]) == []


@pytest.mark.parametrize("axis", [0, 1])
def test_pieces_of_rows(axis: int) -> None:
    """Every way to cut a factor and to choose rows: exactly their elements, each once."""
    shape = (4, 3) if axis == 0 else (3, 4)
    row = torch.arange(4).view(-1, 1).expand(4, 3) if axis == 0 else torch.arange(4).expand(3, 4)
    for lo in range(12):
        for hi in range(lo + 1, 13):
            part, rows = Part("A", 0, lo, hi - lo, shape, axis), row.reshape(-1)[lo:hi]
            for first in range(4):
                for last in range(first + 1, 5):
                    value = torch.zeros(hi - lo)
                    for piece in row_pieces(part, value, first, last):
                        piece += 1
                    assert torch.equal(value, ((rows >= first) & (rows < last)).float())


def sharded_views(values_P: Tensor, pieces: int) -> list[ShardView]:
    factors, views = svd_factors(LAYOUT), []
    for index, (start, stop) in enumerate(pairwise(uneven_cuts(len(values_P), pieces))):
        at, first = {}, 0
        for f in factors:
            lo, hi = max(first, start), min(first + f.numel, stop)
            if lo < hi:
                at[Part(f.name, f.module, lo - first, hi - lo, f.shape, f.rank_axis)] = lo
            first += f.numel
        views.append(ShardView(f"buffer{index}", tuple(at), at, values_P, values_P))
    return views


def train(method: IncreLoRA, pieces: int, weight_decay: float) -> Tensor:
    """All steps with random gradients (none for rows that have not joined), one optimizer for everything."""
    size = sum(f.numel for f in svd_factors(LAYOUT))
    flat = nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(1)))
    optimizer = torch.optim.AdamW([flat], lr=0.1, weight_decay=weight_decay, eps=1e-12)
    scheduler = get_scheduler("linear", optimizer, RATES.warmup, STEPS)
    views = sharded_views(flat.data, pieces)
    decision = initial_decision(method.policy, LAYOUT)
    draw = torch.Generator().manual_seed(2)
    for step in range(1, STEPS + 1):
        flat.grad = torch.randn(size, generator=draw) * joined(method).ne(NEVER)
        for view in views:
            method.before(view, step)
        optimizer.step()
        for view in views:
            method.observe(view, step)
        scheduler.step()
        decision = (play(method, decision, range(step, step + 1)) or [decision])[-1]
    return flat.detach()


def joined(method: IncreLoRA) -> Tensor:
    """For every element, the step after which it began to learn."""
    state, out = method.shared_state(), []
    for f in svd_factors(LAYOUT):
        rows = torch.tensor(state["sigma_joined" if f.name == "E" else "vectors_joined"][f.module])
        shape = [1] * len(f.shape)
        assert f.rank_axis is not None
        shape[f.rank_axis] = -1
        out.append(rows.view(shape).expand(f.shape).reshape(-1))
    return torch.cat(out)


def fresh_groups(steps_joined: Tensor, weight_decay: float) -> Tensor:
    """The released code's way: a parameter of its own for what joins after the same step."""
    size = len(steps_joined)
    start = torch.randn(size, generator=torch.Generator().manual_seed(1))
    groups = {int(j): nn.Parameter(start.clone()) for j in steps_joined.unique() if j != NEVER}
    optimizers = {j: torch.optim.AdamW([p], lr=0.1, weight_decay=weight_decay, eps=1e-12) for j, p in groups.items()}
    draw = torch.Generator().manual_seed(2)
    for step in range(1, STEPS + 1):
        grad = torch.randn(size, generator=draw)
        for j, optimizer in optimizers.items():
            if step > j:
                optimizer.param_groups[0]["lr"] = 0.1 * RATES.rate(step, j)
                groups[j].grad = grad.clone()
                optimizer.step()
    result = start.clone()
    for j, parameter in groups.items():
        result[steps_joined == j] = parameter.detach()[steps_joined == j]
    return result


def test_late_rows_learn_as_fresh_groups_do() -> None:
    """Learning rate and bias correction; the same on any shards."""
    method = method_of()
    whole = train(method, 1, 0.0)
    expected = fresh_groups(joined(method), 0.0)
    assert set(joined(method).unique().tolist()) == {NEVER, 0, 5, 9}
    torch.testing.assert_close(whole, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(train(method_of(), 4, 0.0), whole)
    plain = train(method_of(lr_restart=False), 1, 0.0)
    late = joined(method) > 0
    assert torch.equal(plain[~late], whole[~late]) and not torch.isclose(plain[late], whole[late]).any()


@pytest.mark.parametrize("lr_restart", [True, False])
def test_waiting_rows_do_not_decay(lr_restart: bool) -> None:
    rates = RatePlan("linear", 3, STEPS, (0.9, 0.999), 0.5)
    method = method_of(rates, lr_restart=lr_restart)
    assert method.needs_before
    found = train(method, 3, 0.5)
    start = torch.randn(len(found), generator=torch.Generator().manual_seed(1))
    vectors = torch.cat([torch.full((f.numel,), f.name != "E") for f in svd_factors(LAYOUT)])
    waits = (joined(method) == NEVER) & vectors
    assert waits.any() and torch.equal(found[waits], start[waits])
    assert not method_of(lr_restart=False).needs_before


def test_unchosen_rows_are_not_touched() -> None:
    rates = RowRates()
    rates.choose({(0, "A"): [Run(1, 2, 5)]})
    values = torch.randn(sum(f.numel for f in svd_factors(LAYOUT)))
    (view,) = sharded_views(values, 1)
    rates.keep(view)
    old = values.clone()
    values.add_(1)
    asked: list[int] = []

    def factor(step: int) -> float:
        asked.append(step)
        return 0.25

    rates.rescale(view, factor)
    changed: Sequence[float] = (values - old).round(decimals=4).tolist()
    wide = LAYOUT.in_features[0]
    assert changed == [1.0] * wide + [0.25] * wide + [1.0] * (len(values) - 2 * wide) and asked == [5]
