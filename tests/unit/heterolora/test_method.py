"""What HeteroLoRA makes of scores: decisions, skipped events, fall-backs, and a search that goes on after a restart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from salient_ds.heterolora.method import HeteroLoRA
from salient_ds.heterolora.options import HeteroLoRAConfig
from salient_ds.heterolora.probing import ProbeScores, ProbingMethod
from salient_ds.ranks import RankLayout, initial_decision

NAMES = tuple(f"model.layers.{i}.self_attn.{n}_proj" for i in range(3) for n in "qv")
SHORTCUTS = tuple(f"model.layers.{i}.residual_1" for i in range(3))
LAYOUT = RankLayout(NAMES + SHORTCUTS, (4,) * 6 + (2,) * 3, (16,) * 9, (16, 8) * 3 + (16,) * 3)
M = len(LAYOUT.modules)


def make(**options: Any) -> HeteroLoRA:
    common = {"interval": 2, "interval_unit": "steps", "keep": 0.34}
    method = HeteroLoRAConfig(**(common | options)).build(LAYOUT, 8)
    assert isinstance(method, HeteroLoRA) and isinstance(method, ProbingMethod)
    return method


def scores(*values: float, trained: bool = True) -> ProbeScores:
    return ProbeScores(torch.tensor(values, dtype=torch.float64), torch.full((len(values),), trained))


def take(method: HeteroLoRA, step: int, found: ProbeScores, previous: Any = None) -> Any:
    event = method.probe_due(step)
    assert event is not None
    assert method.take_probe(event, method.proxy_of(event), found) is None
    previous = previous or initial_decision(method.policy, LAYOUT)
    return method.allocate(method.contribution(), event, previous)


def test_the_best_modules_are_on_with_all_their_rows() -> None:
    method = make()
    decision = take(method, 0, scores(*range(M)))
    # 2 of 6 linear layers and 1 of 3 shortcuts, in one ranking
    assert decision.ranks(LAYOUT) == [0, 0, 0, 0, 0, 0, 2, 2, 2]
    assert (decision.step, decision.budget, decision.threshold, decision.hold) == (0, 12, 6.0, False)
    assert method.probe_due(0) is None and method.probe_due(1) is None and method.probe_due(2) is not None
    assert method.history == [{"step": 0, "proxy": "grad_norm", "scores": list(map(float, range(M))),
                               "on": [False] * 6 + [True] * 3, "budget": 3, "spent": 3}]  # fmt: skip
    last = take(method, 6, scores(*range(M, 0, -1)))
    assert last.hold and last.ranks(LAYOUT) == [4, 4, 4, 0, 0, 0, 0, 0, 0]


def test_modes_and_units() -> None:
    separated = take(make(mode="separated"), 0, scores(*range(M)))
    assert separated.ranks(LAYOUT) == [0, 0, 0, 0, 4, 4, 0, 0, 2]
    off = take(make(mode="off"), 0, scores(*range(M)))
    assert off.ranks(LAYOUT) == [0, 0, 0, 0, 4, 4, 2, 2, 2]
    method = make(budget_unit="params")
    take(method, 0, scores(*range(M)))
    assert method.history[0]["spent"] <= method.history[0]["budget"] == int(0.34 * 672) + int(0.34 * 192)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_change_nothing(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    method = make()
    first = take(method, 0, scores(*range(M)))
    assert take(method, 2, scores(*[1.0] * (M - 1), bad), first) is first
    assert "not finite" in caplog.text and "skipped" in method.history[-1]
    assert method.rates.on_M == [False] * 6 + [True] * 3
    assert method.probe_due(2) is None  # not again
    assert take(method, 4, scores(*range(M, 0, -1)), first) is not first


@pytest.mark.parametrize("found", [scores(*[0.0] * M, trained=False), scores(*[1.0] * 3, *[0.0] * 6, trained=False)])
def test_snip_falls_back_while_a_module_is_untrained(found: ProbeScores, caplog: pytest.LogCaptureFixture) -> None:
    method = make(proxy="snip")
    event = method.probe_due(0)
    assert event is not None and method.take_probe(event, "snip", found) == "grad_norm"
    assert "ranked by grad_norm" in caplog.text
    assert method.take_probe(event, "grad_norm", scores(*range(M))) is None
    method.allocate({}, event, initial_decision(method.policy, LAYOUT))
    assert method.history[0]["proxy"] == "grad_norm"
    refusing = make(proxy="snip", degenerate="refuse")
    with pytest.raises(ValueError, match="method.degenerate=grad_norm"):
        refusing.take_probe(event, "snip", found)


def test_first_epochs_are_drawn() -> None:
    config = HeteroLoRAConfig(interval=0.5, constant_epochs=1, proxy="snip")
    method = config.build(LAYOUT, 12, steps_per_epoch=4)
    assert isinstance(method, HeteroLoRA)
    assert [(e.step, method.proxy_of(e)) for e in method.searches] == [
        (0, "constant"), (2, "constant"), (4, "snip"), (6, "snip"), (8, "snip"), (10, "snip"),
    ]  # fmt: skip


def test_a_restart_goes_on_drawing_where_it_stopped() -> None:
    whole, first, second = make(proxy="constant"), make(proxy="constant"), make(proxy="constant", tie_seed=99)
    ties = scores(*[1.0] * M)
    expected = [take(whole, step, ties).digest() for step in (0, 2, 4, 6)]
    found = [take(first, step, ties).digest() for step in (0, 2)]
    for _ in range(3):
        first.end_step(1, None)
    second.load_state(first.shared_state(), lambda *_: torch.zeros(0))
    assert second.rates.steps_M == first.rates.steps_M and second.probe_due(2) is None
    found += [take(second, step, ties).digest() for step in (4, 6)]
    assert found == expected and len(set(expected)) == 4


def test_jacob_cov_is_no_choice() -> None:
    with pytest.raises(ValueError, match="grad_norm"):
        HeteroLoRAConfig(proxy="jacob_cov")  # type: ignore[arg-type]
