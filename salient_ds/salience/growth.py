"""IncreLoRA's growth: when ranks are added, how many, and to which matrices. No torch.

Numbers: M = adapted matrices, h = matrices that grow at an event, a = rows that one of them gains.  Steps are applied
optimizer steps, counted from 1; the released code's step s, counted from 0, is our step s + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from salient_ds.salience.budget import Event, steps_or_fraction

if TYPE_CHECKING:
    from salient_ds.method_config import IncreLoRAConfig

DEFAULT_ADD = {2: 1, 4: 2, 6: 3, 8: 4}
"""Rows gained at once by mean target rank, as in the released code."""
RESERVE_SIGMA = 1e-5
"""Singular value of a reserve row: enough for its vectors to learn, too little to change the output."""


@dataclass(frozen=True)
class GrowthPlan:
    """The numbers that growth is made from, checked against each other.

    Raises:
        ValueError: a target that growth cannot reach from the start, or more matrices per event than there are.
    """

    total_steps: int
    ranks: tuple[int, ...]
    """The most that every matrix may grow to."""
    start_rank: int
    target_total: int
    """Sum of ranks at which growth ends."""
    initial_warmup: int
    interval: int
    top_h: int
    add: int
    exact: bool
    """Whether growth stops at exactly the target."""

    def __post_init__(self) -> None:
        if self.start_rank > min(self.ranks):
            raise ValueError(
                f"method.start_rank={self.start_rank} is above adapter.rank={min(self.ranks)}, the most a matrix may "
                "grow to: lower the former or raise the latter"
            )
        if not self.initial_total <= self.target_total <= sum(self.ranks):
            raise ValueError(
                f"target total rank {self.target_total} lies outside {self.initial_total}..{sum(self.ranks)}, the sums "
                f"of ranks at the start (method.start_rank={self.start_rank}) and with every matrix at adapter.rank: "
                "ranks only grow, change the target, method.start_rank or adapter.rank"
            )
        if self.top_h > len(self.ranks):
            raise ValueError(f"method.top_h={self.top_h} is above the {len(self.ranks)} adapted matrices: lower it")

    @property
    def initial_total(self) -> int:
        """Sum of ranks before the first event."""
        return self.start_rank * len(self.ranks)

    def due_steps(self) -> range:
        """Steps after which ranks may grow: in the released code every s > initial_warmup with s % interval == 0."""
        first = (self.initial_warmup // self.interval + 1) * self.interval
        return range(first + 1, self.total_steps + 1, self.interval)

    def total_after(self, total: int) -> int:
        """Sum of ranks after one more event (threshold: without ties, which make more matrices grow)."""
        if self.exact:
            return min(self.target_total, total + self.top_h * self.add)
        return total + min(self.top_h, self.target_total - total) * self.add


def growth_plan(config: IncreLoRAConfig, ranks: Sequence[int], total_steps: int) -> GrowthPlan:
    """The plan of a configured run over matrices that may grow to ``ranks``.

    Raises:
        ValueError: see :class:`GrowthPlan` and :func:`steps_or_fraction`; no default for ``method.add``.
    """
    target = _target(config, len(ranks))
    return GrowthPlan(
        total_steps=total_steps,
        ranks=tuple(ranks),
        start_rank=config.start_rank,
        target_total=target,
        initial_warmup=steps_or_fraction(config.initial_warmup, total_steps),
        interval=config.interval,
        top_h=config.top_h,
        add=rows_added(config, len(ranks)),
        exact=config.ties == "exact",
    )


def rows_added(config: IncreLoRAConfig, num_matrices: int) -> int:
    """Rows that a matrix gains at once.

    Raises:
        ValueError: no default for ``method.add``.
    """
    return config.add or _default_add(_target(config, num_matrices) / num_matrices)


def reserve_rows(config: IncreLoRAConfig, num_matrices: int) -> int:
    """Rows of a matrix that train ahead of time while growth goes on: as many as it gains at once.

    Raises:
        ValueError: no default for ``method.add``.
    """
    return rows_added(config, num_matrices) if config.advance_learning else 0


def headroom(active: int, add: int, left: int) -> int:
    """Rows that a matrix of ``active`` rows is given beyond those and its reserve, when all get new room anyway.

    What it gains at once, or half of what it has: one that grows often then needs new room only every so often. No
    more than are ``left`` until the target.
    """
    return min(left, max(add, active // 2))


def first_room(config: IncreLoRAConfig, num_matrices: int, most: int) -> int:
    """Rows that every matrix begins with if room is made in flight.

    Raises:
        ValueError: no default for ``method.add``.
    """
    start, add = config.start_rank, rows_added(config, num_matrices)
    left = max(0, _target(config, num_matrices) - start * num_matrices)
    return min(most, start + reserve_rows(config, num_matrices) + headroom(start, add, left))


def more_room(plan: GrowthPlan, active_M: Sequence[int], reserve: int, room_M: Sequence[int]) -> tuple[int, ...] | None:
    """Rows that every matrix is to have before it grows to ``active_M`` rows and ``reserve`` more; None: it has them.

    If one matrix has too few, all get new headroom: they are made anew together.
    """
    least_M = [min(most, active + reserve) for most, active in zip(plan.ranks, active_M, strict=True)]
    if all(least <= room for least, room in zip(least_M, room_M, strict=True)):
        return None
    left = max(0, plan.target_total - sum(active_M))
    wanted_M = [active + reserve + headroom(active, plan.add, left) for active in active_M]
    return tuple(max(room, min(most, wanted)) for room, most, wanted in zip(room_M, plan.ranks, wanted_M, strict=True))


def in_multiples(room: int, multiple: int, most: int) -> int:
    """``room`` rows rounded up to a multiple, but no more than ``most``."""
    return min(most, -(-room // multiple) * multiple)


def largest_rooms(config: IncreLoRAConfig, widths_M: Sequence[int], most: int, multiple: int = 1) -> list[int]:
    """Rows of every matrix if growth goes to where it costs most memory; never more elements than that (but for ties).

    Args:
        widths_M: elements that one row of every matrix has.
        multiple: what rooms are multiples of.

    Raises:
        ValueError: no default for ``method.add``.
    """
    count = len(widths_M)
    start, add, reserve = config.start_rank, rows_added(config, count), reserve_rows(config, count)
    left = max(0, _target(config, count) - start * count)

    def room(active: int) -> int:
        return min(most, active + reserve + headroom(active, add, most) + multiple - 1)  # however rounding falls

    full = next((active for active in range(start, most) if room(active) == most), most)
    rooms = [0] * count
    for k in sorted(range(count), key=lambda k: -widths_M[k]):
        gain = min(left, full - start)
        left -= gain
        rooms[k] = room(start + gain)
    return rooms


def _target(config: IncreLoRAConfig, num_matrices: int) -> int:
    if config.target_total is not None:
        return config.target_total
    assert config.target_rank is not None
    return round(config.target_rank * num_matrices)


def _default_add(mean_target: float) -> int:
    if mean_target not in DEFAULT_ADD:
        known = ", ".join(f"{rank}: {add}" for rank, add in DEFAULT_ADD.items())
        raise ValueError(
            f"method.add has no default for a mean target rank of {mean_target:g} (there is one for {known}): set it"
        )
    return DEFAULT_ADD[int(mean_target)]


def growth_events(config: IncreLoRAConfig, ranks: Sequence[int], total_steps: int) -> list[Event]:
    """All events of a configured run; what training and ``salient-ds check`` both use.

    With ``ties: exact`` every event's total is exact. With ``ties: threshold`` the list is an upper one: ties make
    ranks grow faster, and events after the target are then without effect.

    Returns:
        No event if the target is the initial total: the method then is LoRA in SVD form.

    Raises:
        ValueError: the events that fit into the run do not reach the target; ``ties: threshold`` and so little room
            that a single matrix may want to grow beyond it.
    """
    plan = growth_plan(config, ranks, total_steps)
    events: list[Event] = []
    total = plan.initial_total
    for step in plan.due_steps():
        if total >= plan.target_total:
            break
        total = plan.total_after(total)
        events.append(Event(step, total, 1, step))
    if total < plan.target_total:
        raise ValueError(
            f"{len(events)} growth events (after initial_warmup={plan.initial_warmup}, every {plan.interval} of "
            f"{plan.total_steps} steps, {plan.top_h} matrices by {plan.add}) only reach a sum of ranks of {total}, "
            f"below the target {plan.target_total}: lower method.interval or the warm-up, raise method.top_h or "
            "method.add, or train longer"
        )
    needed = plan.start_rank + len(events) * plan.add
    if not plan.exact and needed > min(plan.ranks):
        raise ValueError(
            f"adapter.rank={min(plan.ranks)} is too little for method.ties=threshold: a matrix may grow at all "
            f"{len(events)} events to rank {needed}, raise it to that or set method.ties=exact"
        )
    return events


@dataclass(frozen=True)
class Growth:
    """Outcome of one event."""

    rows: tuple[int, ...]
    """Rows that every matrix gains (M numbers)."""
    threshold: float
    """Lowest score of a matrix that grows."""


def grow_exact(score_M: Sequence[float], room_M: Sequence[int], rows: int, add: int) -> Growth:
    """Give ``rows`` rows away: ``add`` to each matrix from the highest score down (ties: the earlier one first).

    A matrix takes no more than it has room for, the rest goes on to the next one; should all have taken their share
    and rows be left, they go round again.
    """
    assert rows <= sum(room_M)
    order = sorted(range(len(score_M)), key=lambda k: (-score_M[k], k))
    gained = [0] * len(score_M)
    threshold, left = float("nan"), rows
    while left:
        for k in order:
            share = min(add, room_M[k] - gained[k], left)
            if share:
                gained[k] += share
                left -= share
                threshold = score_M[k]
    return Growth(tuple(gained), min((score_M[k] for k in order if gained[k]), default=threshold))


def grow_threshold(score_M: Sequence[float], count: int, add: int) -> Growth:
    """The released code's rule: every matrix whose score is at least the ``count``-th largest gains ``add`` rows."""
    threshold = sorted(score_M, reverse=True)[count - 1]
    return Growth(tuple(add if score >= threshold else 0 for score in score_M), threshold)


def exact_scores(reduction: Literal["auto", "mean", "exact"], accumulation: int) -> bool:
    """Whether scores are those of the averaged gradient (``exact``) instead of averaged scores (``mean``).

    ``auto`` is exact where a step has one micro-batch on a process (``accumulation`` 1).

    Raises:
        ValueError: exact with gradient accumulation: the gradient is in several pieces, none of which is kept.
    """
    if reduction == "exact" and accumulation > 1:
        raise ValueError(
            f"method.score_reduction=exact needs the gradient of a whole step at once, but a step has {accumulation} "
            "micro-batches on a process: set method.score_reduction=mean, or raise train.micro_batch_size (or the "
            "number of processes) until train.global_batch_size = micro_batch_size x processes"
        )
    return reduction == "exact" or (reduction == "auto" and accumulation == 1)
