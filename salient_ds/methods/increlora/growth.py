"""IncreLoRA's growth: when ranks are added, how many, and to which matrices. No torch.

Numbers: M = adapted matrices, h = matrices that grow at an event, a = rows that one of them gains. Steps are applied
optimizer steps, counted from 1; the released code's step s, counted from 0, is our step s + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from salient_ds.ranks import Event
from salient_ds.salience.budget import refuse_many

DEFAULT_ADD = {2: 1, 4: 2, 6: 3, 8: 4}
"""Rows that a matrix gains at once, by mean target rank, as in the released code."""


@dataclass(frozen=True)
class GrowthPlan:
    """The numbers that define growth, checked against each other.

    Raises:
        ValueError: a start rank above the largest rank, a target that growth cannot reach from the start, or more
            matrices per event than there are.
    """

    total_steps: int
    ranks: tuple[int, ...]
    """Largest rank that every matrix may grow to."""
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
        """Steps after which ranks may grow. In the released code: every s > initial_warmup with s % interval == 0."""
        first = (self.initial_warmup // self.interval + 1) * self.interval
        return range(first + 1, self.total_steps + 1, self.interval)

    def total_after(self, total: int) -> int:
        """Sum of ranks after one more event. If not ``exact``, this assumes no ties, which make more matrices grow."""
        if self.exact:
            return min(self.target_total, total + self.top_h * self.add)
        return total + min(self.top_h, self.target_total - total) * self.add


def headroom(active: int, add: int, left: int) -> int:
    """Spare rows allocated for a matrix beyond its ``active`` rows and its reserve, when all matrices are resized.

    That is ``add`` or half of ``active``, whichever is larger. So a matrix that grows often needs to be resized only
    now and then. It is never more than the ``left`` rows that are missing to the target.
    """
    return min(left, max(add, active // 2))


def more_room(plan: GrowthPlan, active_M: Sequence[int], reserve: int, room_M: Sequence[int]) -> tuple[int, ...] | None:
    """Rows to allocate for every matrix so that it can hold ``active_M`` active rows and ``reserve`` more.

    None: all matrices have enough allocated rows (``room_M``). If one has too few, all get new headroom, because they
    are rebuilt together.
    """
    least_M = [min(most, active + reserve) for most, active in zip(plan.ranks, active_M, strict=True)]
    if all(least <= room for least, room in zip(least_M, room_M, strict=True)):
        return None
    left = max(0, plan.target_total - sum(active_M))
    wanted_M = [active + reserve + headroom(active, plan.add, left) for active in active_M]
    return tuple(max(room, min(most, wanted)) for room, most, wanted in zip(room_M, plan.ranks, wanted_M, strict=True))


def largest_rooms(
    *, widths_M: Sequence[int], most: int, start: int, add: int, reserve: int, target: int, multiple: int = 1
) -> list[int]:
    """Rows allocated for every matrix if growth takes its most memory-hungry course. Only ties can lead to more
    elements.

    Args:
        widths_M: number of elements of one row, for every matrix.
        most: largest number of rows of a matrix.
        start, add, reserve: rows at the start, rows gained at once, rows that train before they are activated.
        target: sum of ranks at which growth ends.
        multiple: allocated rows are rounded up to a multiple of this number.
    """
    count = len(widths_M)
    left = max(0, target - start * count)

    def room(active: int) -> int:
        return min(most, active + reserve + headroom(active, add, most) + multiple - 1)  # the most after rounding up

    full = next((active for active in range(start, most) if room(active) == most), most)
    rooms = [0] * count
    for k in sorted(range(count), key=lambda k: -widths_M[k]):
        gain = min(left, full - start)
        left -= gain
        rooms[k] = room(start + gain)
    return rooms


def default_add(mean_target: float) -> int:
    """Rows gained at once for a mean target rank.

    Raises:
        ValueError: there is no default for it.
    """
    if mean_target not in DEFAULT_ADD:
        known = ", ".join(f"{rank}: {add}" for rank, add in DEFAULT_ADD.items())
        raise ValueError(
            f"method.add has no default for a mean target rank of {mean_target:g} (there is one for {known}): set it"
        )
    return DEFAULT_ADD[int(mean_target)]


_EVENTS = 24
"""Events of a suggested schedule, if the run is long enough."""


def suggested(matrices: int, total_steps: int, target_rank: float, start: int) -> dict[str, tuple[int | float, str]]:
    """See :meth:`IncreLoRAConfig.suggested`."""
    add = DEFAULT_ADD.get(int(target_rank), max(1, round(target_rank / 2)))
    rows = max(0, round(target_rank * matrices) - start * matrices)
    half = max(1, total_steps // 2)
    events = max(1, min(_EVENTS, half // 2 - 1))
    top_h = max(1, min(matrices, -(-rows // (add * events))))
    events = max(1, -(-rows // (add * top_h)))
    interval = max(1, (half - 1) // (events + 1))  # the last event comes after step (events + 1) interval + 1
    return {
        "initial_warmup": (interval, "steps before ranks may grow"),
        "interval": (interval, f"steps between events: growth ends at about half of {total_steps}"),
        "top_h": (top_h, f"of {matrices} matrices grow at an event"),
        "add": (add, "rows that each of them gains"),
    }


def growth_events(plan: GrowthPlan) -> list[Event]:
    """All events of a run, for both training and ``salient-ds check``.

    With ``ties: exact`` every event's total is exact. With ``ties: threshold`` there may be more events than needed:
    ties make ranks grow faster, and events after the target is reached have no effect.

    Returns:
        An empty list if the target is the initial total: the method is then LoRA in SVD form.

    Raises:
        ValueError: the events that fit into the run do not reach the target; or, with ``ties: threshold``, a single
            matrix could grow beyond its largest rank.
    """
    events: list[Event] = []
    total = plan.initial_total
    for step in plan.due_steps():
        if total >= plan.target_total:
            break
        refuse_many(len(events))
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
    """Rows gained by every matrix (M numbers)."""
    threshold: float
    """Lowest score of a matrix that grows."""


def grow_exact(score_M: Sequence[float], room_M: Sequence[int], rows: int, add: int) -> Growth:
    """Distribute ``rows`` rows: ``add`` to each matrix, from the highest score down (ties: the earlier one first).

    A matrix takes no more rows than ``room_M`` allows; the rest goes to the next one. If rows are left after all
    matrices have had their turn, another round starts.
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
