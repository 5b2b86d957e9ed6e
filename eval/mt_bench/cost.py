"""Estimate tokens and money before a run, and keep a running total that a limit can stop.

No price list: prices change, so they are given by the user in dollars per million tokens.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

from .prompts import Messages
from .verdicts import Reply

# UTF-8 bytes per token: about 4 for English with a GPT tokenizer; the ceiling takes 2, below which no judge
# prompt of MT-Bench falls, so that a limit is not passed by a bad guess.
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
    """Prompt tokens of one call, estimated from its length; ``ceiling`` gives a bound instead of a guess."""
    per_token = BYTES_PER_TOKEN_CEILING if ceiling else BYTES_PER_TOKEN
    size = sum(len(message["content"].encode()) for message in messages)
    return math.ceil(size / per_token) + TOKENS_PER_MESSAGE * len(messages)


class Budget:
    """Money spent and money reserved by calls on their way. Never lets their sum pass ``limit``."""

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
        """The most that this call can cost."""
        assert self.price is not None
        return self.price.of(estimate_tokens(messages, ceiling=True), self.max_tokens)

    def reserve(self, messages: Messages) -> bool:
        """True when the call may be made. Every True is followed by one ``settle``."""
        if self.limit is None:
            return True
        with self._lock:
            wanted = self.ceiling(messages)
            if (self.spent or 0.0) + self._reserved + wanted > self.limit:
                return False
            self._reserved += wanted
            return True

    def settle(self, messages: Messages, reply: Reply | None) -> None:
        """Replace the reservation by what the reply says it used (or by an estimate if it says nothing)."""
        with self._lock:
            if self.limit is not None:
                self._reserved -= self.ceiling(messages)
            if reply is None:
                return
            used = reply.prompt_tokens if reply.prompt_tokens is not None else estimate_tokens(messages)
            made = reply.completion_tokens
            self.prompt_tokens += used
            self.completion_tokens += made if made is not None else len(reply.text or "") // 4
