"""IncreLoRA with room for some of its rows: how much, when more, and that it decides nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from salient_ds.engine.compact import in_multiples
from salient_ds.methods.increlora.growth import headroom, more_room
from salient_ds.methods.increlora.method import IncreLoRA
from salient_ds.methods.increlora.options import IncreLoRAConfig
from salient_ds.methods.increlora.row_rates import NEVER
from salient_ds.ranks import RankLayout, initial_decision
from salient_ds.salience.learning_rate import RatePlan
from tests.support.layouts import layout_of

MATRICES, MOST, STEPS = 12, 20, 62
LAYOUT = RankLayout(tuple("abcdefghijkl"), (MOST,) * MATRICES, (6,) * MATRICES, tuple(range(5, 5 + MATRICES)))
BASE: dict[str, Any] = {"target_rank": 6, "interval": 3, "top_h": 2, "add": 2}
RATES = RatePlan("linear", 3, STEPS, (0.9, 0.999), 0.1)


def config_of(**options: Any) -> IncreLoRAConfig:
    return IncreLoRAConfig(**BASE | options)


def at(room: tuple[int, ...]) -> RankLayout:
    return RankLayout(LAYOUT.modules, room, LAYOUT.in_features, LAYOUT.out_features)


def test_headroom() -> None:
    assert [headroom(active, 4, 100) for active in (1, 8, 9, 10, 30)] == [4, 4, 4, 5, 15]
    assert headroom(30, 4, 3) == 3 and headroom(30, 4, 0) == 0


def test_the_first_room() -> None:
    assert config_of().first_room(MATRICES, MOST) == 1 + 2 + 2
    assert config_of(advance_learning=False).first_room(MATRICES, MOST) == 1 + 2
    assert config_of().first_room(MATRICES, 4) == 4
    assert config_of(target_rank=1).first_room(MATRICES, MOST) == 1 + 2  # nothing will grow
    with pytest.raises(ValueError, match="method.add has no default"):
        config_of(add=None, target_rank=5).first_room(MATRICES, MOST)


def test_more_room_only_when_a_row_lacks_it() -> None:
    plan = config_of(target_rank=10).plan(layout_of((9, 9, 20, 20)), 100)
    assert more_room(plan, [3, 3, 3, 1], 2, (5, 5, 5, 5)) is None
    assert more_room(plan, [3, 1, 4, 1], 2, (5, 5, 5, 5)) == (7, 5, 8, 5)  # those that had enough: headroom again
    assert more_room(plan, [8, 1, 12, 1], 2, (9, 5, 5, 5)) == (9, 5, 20, 5)  # capped, with half of 12 to spare
    assert more_room(plan, [8, 1, 12, 1], 2, (9, 9, 5, 5)) == (9, 9, 20, 5)  # never less than there is
    assert more_room(plan, [9, 9, 20, 1], 2, (9, 9, 20, 5)) is None
    assert more_room(plan, [9, 9, 9, 12], 2, (9, 9, 11, 5)) == (9, 9, 12, 15)  # one row is left to give away
    assert more_room(plan, [9, 9, 9, 13], 0, (9, 9, 9, 11)) == (9, 9, 9, 13)  # nothing comes after the target


SCORES = {
    "random": lambda draw: torch.rand(MATRICES, generator=draw),
    "a few": lambda draw: torch.rand(MATRICES, generator=draw) * torch.tensor([1.0] + [0.01] * 10 + [1.0]),
    "widest": lambda draw: torch.arange(1.0, 1 + MATRICES),
}


@pytest.mark.parametrize(
    "options", [{}, {"advance_learning": False}, {"ties": "threshold", "interval": 8, "top_h": 5}], ids=str
)
@pytest.mark.parametrize("scores", SCORES)
@pytest.mark.parametrize("multiple", [1, 4])
def test_decisions_do_not_depend_on_room(multiple: int, scores: str, options: dict[str, Any]) -> None:
    """Nor does what is remembered; rooms stay below the bound that memory is estimated with."""
    config, draw = config_of(**options), torch.Generator().manual_seed(5)
    total, flight = (IncreLoRA(config, LAYOUT, STEPS, RATES) for _ in range(2))
    flight.resized(at((config.first_room(MATRICES, MOST),) * MATRICES))
    wanted = initial_decision(total.policy, LAYOUT)
    mine = initial_decision(flight.policy, flight.layout)
    widths = [a + b + 1 for a, b in zip(LAYOUT.in_features, LAYOUT.out_features, strict=True)]
    bound = elements(tuple(config.largest_rooms(LAYOUT, multiple)), widths)
    made = 0
    for event in total.events:
        score_M = SCORES[scores](draw)
        for method in (total, flight):
            if method.scored_at(event.step):
                method.take_scores(score_M, event.step)
        assert total.room_for(event, wanted) is None
        room = flight.room_for(event, mine)
        if room is not None:
            room = tuple(in_multiples(rows, multiple, MOST) for rows in room)
            mine = type(mine)(mine.step, mine.budget, move(mine.mask_N, flight.layout.ranks, room), hold=mine.hold)
            flight.resized(at(room))
            made += 1
        wanted, mine = total.allocate({}, event, wanted), flight.allocate({}, event, mine)
        assert mine.ranks(flight.layout) == wanted.ranks(LAYOUT) and mine.hold == wanted.hold
        reserve = 0 if mine.hold or not config.advance_learning else 2
        for rank, rows in zip(mine.ranks(flight.layout), flight.layout.ranks, strict=True):
            assert rows >= min(MOST, rank + reserve)
        assert flight.shared_state() == total.shared_state()
        assert elements(flight.layout.ranks, widths) <= bound
    assert mine.hold and mine.total == 6 * MATRICES
    assert 1 <= made <= len(total.events) // 2


def move(mask_n: Tensor, before: tuple[int, ...], after: tuple[int, ...]) -> Tensor:
    """A mask over rows that there were as one over those that there are."""
    ranks = [int(part.sum()) for part in mask_n.split(list(before))]
    return torch.cat([torch.arange(rows) < rank for rows, rank in zip(after, ranks, strict=True)])


def elements(room: tuple[int, ...], widths: list[int]) -> int:
    return sum(rows * width for rows, width in zip(room, widths, strict=True))


def test_room_for_rows_that_go_round_again() -> None:
    """Where few matrices can still grow, one of them gains more than it usually does at once."""
    layout = RankLayout(("q", "v"), (3, 12), (6, 6), (6, 6))
    config = config_of(target_rank=7, add=3, advance_learning=False)
    method = IncreLoRA(config, layout, 30, RATES)
    method.resized(RankLayout(layout.modules, (3, 6), (6, 6), (6, 6)))
    decision = initial_decision(method.policy, method.layout)
    method.take_scores(torch.tensor([1.0, 0.5]), 1)
    first = method.allocate({}, method.events[0], decision)
    assert first.ranks(method.layout) == [3, 5]
    assert method.room_for(method.events[1], first) == (3, 11)  # six rows, of which it would take three


def test_rows_without_room_have_no_pace() -> None:
    """Weight decay is undone for rows that wait, as far as there are any."""
    method = IncreLoRA(config_of(), LAYOUT, STEPS, RATES)
    for rows in (5, 9):
        method.resized(at((rows,) * MATRICES))
        runs = method._row_rates._runs
        assert {(run.first, run.last, run.joined) for k, f in runs if f == "A" for run in runs[k, f]} == {
            (3, rows, NEVER)
        }
        assert len(method.shared_state()["vectors_joined"][0]) == MOST
    method.resized(at((3,) * MATRICES))
    assert not method._row_rates._runs


def test_rows_are_needed_before_the_event() -> None:
    method = IncreLoRA(config_of(), LAYOUT, STEPS, RATES)
    method.resized(at((2,) * MATRICES))
    with pytest.raises(AssertionError, match="room is made before"):
        method.allocate({}, method.events[0], initial_decision(method.policy, method.layout))
