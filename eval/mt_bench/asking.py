"""Make the calls of a judging run: in which order, how many at once, and when to stop.

The first calls tell whether the judge works at all. So they are few at a time, the shortest prompt comes first (if it
is too long, all are), and the others come from different questions (one that a filter refuses does not stop the run).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Protocol

from .cache import ReplyCache
from .client import CallFailed, HopelessError, JudgeClient
from .cost import Budget
from .matches import Match, Options
from .prompts import Messages
from .refusals import FEW, LimitReached, Streak


class Games(Protocol):
    """What has to be asked, and what is known already. :class:`judge.Judging` is one."""

    cache: ReplyCache
    options: Options
    failures: dict[str, str]
    """Why a call got no reply, by cache key."""

    def games(self) -> Iterator[tuple[Match, tuple[str, ...], Messages, str]]:
        """Yield (match, order, messages, cache key) for every call."""
        ...

    def known(self, key: str, match: Match, order: tuple[str, ...]) -> bool:
        """Whether the cache can answer this call."""
        ...

    def messages(self, match: Match, order: tuple[str, ...]) -> Messages:
        """Return the messages of one call."""
        ...


@dataclass
class Summary:
    """Statistics of a run. ``stopped`` is the reason if it ended early, else empty.

    ``failed`` counts calls without a reply. They are asked again by the same command.
    """

    asked: int = 0
    from_cache: int = 0
    failed: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    unknown_bills: int = 0
    dollars: float | None = None
    dollars_before: float = 0.0
    stopped: str = ""


@dataclass(frozen=True)
class Call:
    """One call that the cache cannot answer. The texts are rendered when it is made."""

    key: str
    match: Match
    order: tuple[str, ...]
    size: int


def plan_calls(run: Games) -> tuple[list[Call], set[str], int]:
    """Return the calls to make in order, the keys of all games, and how many games the cache answers."""
    calls: dict[str, Call] = {}
    keys: set[str] = set()
    from_cache = 0
    for match, order, messages, key in run.games():
        keys.add(key)
        if key in calls:
            continue
        if run.known(key, match, order):
            from_cache += 1
            continue
        calls[key] = Call(key, match, order, sum(len(message["content"]) for message in messages))
    return _probes_first(list(calls.values())), keys, from_cache


def _probes_first(calls: list[Call]) -> list[Call]:
    if not calls:
        return []
    shortest = min(calls, key=lambda call: call.size)
    first, seen = [shortest], {shortest.match.question.question_id}
    for call in calls:
        if len(first) == FEW:
            break
        if call.match.question.question_id not in seen:
            first.append(call)
            seen.add(call.match.question.question_id)
    early = {call.key for call in first}
    return first + [call for call in calls if call.key not in early]


class Asking:
    """The calls of one run. :meth:`run` makes them."""

    def __init__(
        self, run: Games, client: JudgeClient, budget: Budget, progress: Callable[[int], None] | None = None,
        keep_going: bool = False,
    ) -> None:  # fmt: skip
        self.judging, self.client, self.budget, self.progress = run, client, budget, progress
        self.summary = Summary()
        self.streak = Streak(keep_going)
        self._on_the_way: dict[Future[None], Call] = {}

    def run(self) -> Summary:
        """Make all calls, at most ``concurrency`` at a time, until one cannot succeed or the limit is reached.

        Texts are not kept in memory: a reply is written to the cache and read again when its row is written.
        """
        summary = self.summary
        calls, keys, summary.from_cache = plan_calls(self.judging)
        self.streak.any_reply = summary.from_cache > 0
        count_earlier(self.budget, self.judging, keys)
        waiting = deque(calls)
        with ThreadPoolExecutor(self.judging.options.concurrency, thread_name_prefix="judge") as pool:
            try:
                while (waiting and not summary.stopped) or self._on_the_way:
                    while waiting and not summary.stopped and len(self._on_the_way) < self._most():
                        call = waiting.popleft()
                        self._on_the_way[pool.submit(self._ask, call)] = call
                    self._collect()
            except BaseException:
                self.client.stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        summary.prompt_tokens, summary.completion_tokens = self.budget.prompt_tokens, self.budget.completion_tokens
        summary.dollars, summary.dollars_before = self.budget.spent, self.budget.before
        summary.unknown_bills = self.budget.unknown
        return summary

    def _most(self) -> int:
        """Return the number of calls that may be in flight."""
        most = self.judging.options.concurrency
        return most if self.streak.any_reply else min(most, FEW)

    def _ask(self, call: Call) -> None:
        match = call.match
        messages = self.judging.messages(match, call.order)
        about = {"question_id": match.question.question_id, "turn": match.turn, "shown": list(call.order),
                 "prompt": match.template.name, "repeat": match.repeat}  # fmt: skip
        reply = self.client.chat(messages, self.budget.meter(call.key, messages))
        self.judging.cache.put(call.key, reply, about)

    def _collect(self) -> None:
        """Wait until at least one call is done, and record its outcome."""
        summary = self.summary
        for future in wait(self._on_the_way, return_when=FIRST_COMPLETED).done:
            call = self._on_the_way.pop(future)
            try:
                future.result()
                summary.asked += 1
                self.streak.reply()
            except LimitReached as error:
                summary.stopped = summary.stopped or str(error)
            except CallFailed as error:
                summary.asked += not str(error).startswith("not asked")
                summary.failed += 1
                self.judging.failures[call.key] = str(error)
                if not summary.stopped:
                    summary.stopped = self.streak.refused(error)
            except HopelessError as error:
                summary.asked += 1
                summary.failed += 1
                self.judging.failures[call.key] = str(error)
                summary.stopped = summary.stopped or str(error)
            if summary.stopped:
                self.client.stop()
            if self.progress:
                self.progress(1)


def count_earlier(budget: Budget, run: Games, keys: Iterable[str]) -> None:
    """Count what earlier runs spent on these calls: the ledger's attempts, and cached replies that it does not know."""
    if budget.limit is None or budget.price is None:
        return
    wanted = set(keys)
    budget.count_earlier(wanted)
    for key in wanted:
        stored = None if budget.ledger is not None and key in budget.ledger else run.cache.get(key)
        if stored is not None:
            reply = stored[0]
            budget.before += budget.price.of(reply.prompt_tokens or 0, reply.completion_tokens or 0)
