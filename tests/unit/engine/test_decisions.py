"""The order in which decisions take effect. Engine and plain training share it: comparing them shows no error in it."""

from __future__ import annotations

import torch
from torch import Tensor

from salient_ds.engine.decisions import Decisions
from salient_ds.ranks import MaskPolicy, RankDecision


class Recorder:
    """Writes down what it is told, with the step of the decision or the rows."""

    def __init__(self) -> None:
        self.calls: list[tuple[object, ...]] = []

    def hold(self, decision: RankDecision) -> None:
        self.calls.append(("hold", decision.step))

    def apply(self, decision: RankDecision) -> None:
        self.calls.append(("apply", decision.step))

    def start_rows(self, new_N: Tensor, sigma: float) -> None:
        self.calls.append(("start", new_N.nonzero().flatten().tolist(), sigma))

    def new_calls(self) -> list[tuple[object, ...]]:
        calls, self.calls = self.calls, []
        return calls


def decision(step: int, mask: str) -> RankDecision:
    return RankDecision(step, mask.count("1"), torch.tensor([c == "1" for c in mask]))


def started(delay: int = 0, start_sigma: float | None = None, mask: str = "1111") -> tuple[Decisions, Recorder]:
    policy = MaskPolicy(True, True, True, delay=delay, start_sigma=start_sigma)
    recorder, initial = Recorder(), decision(0, mask)
    return Decisions(policy, recorder, initial, initial), recorder


def one_step(decisions: Decisions, recorder: Recorder) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
    """What happens before the method looks, and after the step."""
    decisions.before_observation()
    before = recorder.new_calls()
    decisions.settle()
    return before, recorder.new_calls()


def test_a_decision_acts_at_once() -> None:
    decisions, recorder = started()
    assert one_step(decisions, recorder) == ([], [])
    assert decisions.take(decision(1, "1010")) == 2  # rows that change
    assert recorder.new_calls() == [("hold", 1), ("apply", 1)]
    assert decisions.latest is decisions.held and decisions.held.step == 1
    assert one_step(decisions, recorder) == ([], [])
    assert decisions.take(decision(2, "1100")) == 2
    assert recorder.new_calls() == [("hold", 2), ("apply", 2)]


def test_a_delayed_decision_masks_before_the_next_observation_and_acts_after_it() -> None:
    decisions, recorder = started(delay=1)
    decisions.take(decision(1, "1010"))
    assert recorder.new_calls() == []  # the next forward pass does not know of it
    assert decisions.latest.step == 1 and decisions.held.step == 0
    assert one_step(decisions, recorder) == ([("hold", 1)], [("apply", 1)])
    assert decisions.held is decisions.latest
    assert one_step(decisions, recorder) == ([], [])
    decisions.take(decision(3, "1000"))
    decisions.settle()  # the run ends before its next step
    assert recorder.new_calls() == [("hold", 3), ("apply", 3)] and not decisions.pending


def test_rows_that_join_get_their_first_value() -> None:
    decisions, recorder = started(start_sigma=1e-5, mask="1010")
    decisions.take(decision(1, "1110"))
    assert recorder.new_calls() == [("hold", 1), ("apply", 1), ("start", [1], 1e-5)]
    decisions.take(decision(2, "1111"))
    assert recorder.new_calls() == [("hold", 2), ("apply", 2), ("start", [3], 1e-5)]
