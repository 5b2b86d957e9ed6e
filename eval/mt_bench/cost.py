"""Estimate tokens and cost before a run, and keep a running total that a limit can stop.

There is no price list, because prices change. The user gives them in dollars per million tokens.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

from .prompts import Messages
from .verdicts import Reply

# UTF-8 bytes per token: about 4 for English with a GPT tokenizer. The upper bound assumes 2, and no judge prompt of
# MT-Bench has fewer. So a bad estimate does not make a run exceed its cost limit.
BYTES_PER_TOKEN, BYTES_PER_TOKEN_CEILING = 4.0, 2.0
TOKENS_PER_MESSAGE = 8


@dataclass(frozen=True)
class Price:
    """Dollars per million tokens."""

    prompt: float
    completion: float

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


def estimate_tokens(messages: Messages, ceiling: bool = False) -> int:
    """Estimate the prompt tokens of one call from its length. ``ceiling`` gives an upper bound instead."""
    per_token = BYTES_PER_TOKEN_CEILING if ceiling else BYTES_PER_TOKEN
    size = sum(len(message["content"].encode()) for message in messages)
    return math.ceil(size / per_token) + TOKENS_PER_MESSAGE * len(messages)


class Budget:
    """Dollars spent and dollars reserved for calls in flight. A call may only start if their sum stays in ``limit``."""

    def __init__(self, price: Price | None, limit: float | None, max_tokens: int) -> None:
        if limit is not None and price is None:
            raise ValueError(
                f"--max-cost {limit:g} needs prices: give --price-prompt and --price-completion (dollars per "
                "million tokens)"
            )
        self.price, self.limit, self.max_tokens = price, limit, max_tokens
        self.prompt_tokens = self.completion_tokens = 0
        self._reserved = 0.0
        self._lock = threading.Lock()

    @property
    def spent(self) -> float | None:
        return self.price.of(self.prompt_tokens, self.completion_tokens) if self.price else None

    def ceiling(self, messages: Messages) -> float:
        """Return the most that this call can cost (dollars)."""
        assert self.price is not None
        return self.price.of(estimate_tokens(messages, ceiling=True), self.max_tokens)

    def reserve(self, messages: Messages) -> bool:
        """Reserve the maximum cost of a call, if the limit allows it.

        Returns:
            Whether the call may be made. If so, :meth:`settle` has to follow once.
        """
        if self.limit is None:
            return True
        with self._lock:
            wanted = self.ceiling(messages)
            if (self.spent or 0.0) + self._reserved + wanted > self.limit:
                return False
            self._reserved += wanted
            return True

    def settle(self, messages: Messages, reply: Reply | None) -> None:
        """Replace the reservation by the tokens that the reply reports, or by an estimate if it reports none."""
        with self._lock:
            if self.limit is not None:
                self._reserved -= self.ceiling(messages)
            if reply is None:
                return
            used = reply.prompt_tokens if reply.prompt_tokens is not None else estimate_tokens(messages)
            made = reply.completion_tokens
            self.prompt_tokens += used
            self.completion_tokens += made if made is not None else len(reply.text or "") // 4
