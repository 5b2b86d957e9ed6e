"""Estimate tokens and cost before a run, and keep what is spent below a limit, whatever the server does.

There is no price list, because prices change. The user gives them in dollars per million tokens.

Every attempt, also a retry, reserves the most it can cost before it starts. An attempt whose bill is unknown (a
time-out, a cut body, a reply without a valid usage) is booked at that most. So the sum of what was billed never passes
the limit, as long as a reply costs no more than the most that was reserved for it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass

from .ledger import Ledger, Tokens
from .prompts import Messages
from .refusals import HopelessError, LimitReached

# UTF-8 bytes per token: about 4 for English with a GPT tokenizer. No tokenizer makes more tokens than there are bytes.
BYTES_PER_TOKEN, BYTES_PER_TOKEN_CEILING = 4.0, 1.0
TOKENS_PER_MESSAGE = 8
TOKENS_PER_CALL = 64
"""Upper bound of what a server's chat template adds to a call, beside ``TOKENS_PER_MESSAGE``."""


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens, finite and not negative."""

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        for name, value in (("--price-prompt", self.prompt), ("--price-completion", self.completion)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} {value:g} must be a number of dollars from 0 (per million tokens)")

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


def estimate_tokens(messages: Messages, ceiling: bool = False) -> int:
    """Estimate the prompt tokens of one call from its length. ``ceiling`` gives an upper bound instead."""
    per_token = BYTES_PER_TOKEN_CEILING if ceiling else BYTES_PER_TOKEN
    size = sum(len(message["content"].encode("utf-8", "surrogatepass")) for message in messages)
    return math.ceil(size / per_token) + TOKENS_PER_MESSAGE * len(messages) + (TOKENS_PER_CALL if ceiling else 0)


class Budget:
    """What this run has used, and the reservations of attempts in flight. Thread-safe.

    An attempt may only start if spent plus reserved dollars stay in ``limit``. What earlier runs spent on the same
    calls counts (``ledger``), so that starting a command again does not start its limit again.

    Args:
        most_completion: most completion tokens of one reply; None if nothing bounds them.
        extra_prompt: tokens that the server adds to each prompt (parameters such as tools in ``extra_body``).
    """

    def __init__(
        self, price: Price | None, limit: float | None, most_completion: int | None, ledger: Ledger | None = None,
        extra_prompt: int = 0,
    ) -> None:  # fmt: skip
        if limit is not None:
            _check_limit(limit, price, most_completion)
        self.price, self.limit, self.most_completion = price, limit, most_completion
        self.ledger, self.extra_prompt = ledger, extra_prompt
        self.prompt_tokens = self.completion_tokens = 0
        self.unknown = 0
        """Attempts whose bill is unknown. They are counted at their ceiling."""
        self.overrun = ""
        """Why the limit cannot be kept, if a reply used more than it was allowed."""
        self.before = 0.0
        self._reserved = 0.0
        self._changed = threading.Condition()

    def count_earlier(self, keys: Iterable[str]) -> None:
        """Count what the ledger says of earlier attempts of these calls."""
        if self.ledger is not None and self.price is not None:
            self.before = self.price.of(*self.ledger.spent_on(keys))

    @property
    def spent(self) -> float | None:
        """Dollars of this run."""
        return self.price.of(self.prompt_tokens, self.completion_tokens) if self.price else None

    def ceiling(self, messages: Messages) -> Tokens:
        """Return the most tokens that one attempt can use."""
        return estimate_tokens(messages, ceiling=True) + self.extra_prompt, self.most_completion or 0

    def meter(self, key: str, messages: Messages) -> Meter:
        """Return the meter of one call."""
        return Meter(self, key, self.ceiling(messages))

    def _reserve(self, tokens: Tokens) -> None:
        if self.limit is None or self.price is None:
            return
        wanted = self.price.of(*tokens)
        with self._changed:
            if self.overrun:
                raise HopelessError(self.overrun)
            while self.before + (self.spent or 0.0) + self._reserved + wanted > self.limit:
                if self._reserved <= 1e-12:
                    earlier = f", {self.before:.4f} of them in earlier runs" if self.before else ""
                    raise LimitReached(
                        f"--max-cost {self.limit:g} would be passed by the next call: it can cost {wanted:.4f} "
                        f"dollars, and {self.before + (self.spent or 0.0):.4f} are spent{earlier}. "
                        "Give a higher --max-cost to go on"
                    )
                self._changed.wait()
            self._reserved += wanted

    def _book(self, reserved: Tokens, used: Tokens, unknown: bool) -> None:
        with self._changed:
            if self.limit is not None and self.price is not None:
                self._reserved = max(0.0, self._reserved - self.price.of(*reserved))
            self.prompt_tokens += used[0]
            self.completion_tokens += used[1]
            self.unknown += unknown
            self._changed.notify_all()


class Meter:
    """Books the attempts of one call. Each :meth:`begin` is followed by one of the other methods."""

    def __init__(self, budget: Budget, key: str, ceiling: Tokens) -> None:
        self.budget, self.key, self.ceiling = budget, key, ceiling
        self._entry = ""

    def begin(self) -> None:
        """Reserve the attempt. Waits while others in flight hold what is left.

        Raises:
            LimitReached: the attempt could pass the limit.
            HopelessError: a reply used more than it was allowed, so the limit cannot be kept.
        """
        self.budget._reserve(self.ceiling)
        if self.budget.ledger is not None:
            self._entry = self.budget.ledger.open(self.key, self.ceiling)

    def nothing(self) -> None:
        """Book an attempt that the server refused."""
        self._end((0, 0), unknown=False)

    def lost(self) -> None:
        """Book an attempt whose bill is unknown at the most it can cost."""
        self._end(self.ceiling, unknown=True)

    def used(self, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        """Book what a reply reports. If one of the numbers is missing or nonsense, both count at their ceiling.

        If there is a limit and the server used more than could be reserved, no other attempt may start.
        """
        if prompt_tokens is None or completion_tokens is None:
            self.lost()
            return
        prompt, completion = prompt_tokens, completion_tokens
        self._end((prompt, completion), unknown=False)
        if self.budget.limit is not None and (prompt > self.ceiling[0] or completion > self.ceiling[1]):
            self.budget.overrun = (
                f"a reply used {prompt:,} + {completion:,} tokens (prompt + completion), more than the "
                f"{self.ceiling[0]:,} + {self.ceiling[1]:,} that it was allowed: --max-cost cannot be kept like this. "
                "Give the most that this model writes with --reply-ceiling"
            )

    def _end(self, tokens: Tokens, unknown: bool) -> None:
        if self.budget.ledger is not None:
            self.budget.ledger.close_entry(self._entry, tokens)
        self.budget._book(self.ceiling, tokens, unknown)


def _check_limit(limit: float, price: Price | None, most_completion: int | None) -> None:
    if not (math.isfinite(limit) and limit >= 0):
        raise ValueError(f"--max-cost {limit:g} must be a number of dollars from 0")
    if price is None:
        raise ValueError(
            f"--max-cost {limit:g} needs prices: give --price-prompt and --price-completion (dollars per million "
            "tokens)"
        )
    if price.prompt == price.completion == 0:
        raise ValueError(f"--max-cost {limit:g} limits nothing, because both prices are 0")
    if most_completion is None:
        raise ValueError(
            f"--max-cost {limit:g} with --token-parameter none: nothing bounds the length of a reply. Say with "
            "--reply-ceiling how many tokens this model can write at most (its maximum output, or its context window)"
        )
