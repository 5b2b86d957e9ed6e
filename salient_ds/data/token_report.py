"""Tokenised examples, and what tokenisation did to the rows of a data set."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int32]


class Example(TypedDict):
    """One tokenised conversation; both arrays have the same length."""

    input_ids: Array
    labels: Array


@dataclass
class TokenizationReport:
    """What tokenisation did. Lengths are in tokens; `targets` counts labels that the shifted loss sees."""

    max_length: int
    examples: int = 0
    """Number of conversations."""
    kept: int = 0
    truncated: int = 0
    """Conversations longer than max_length, whether kept or dropped."""
    tokens_cut: int = 0
    dropped: int = 0
    """Conversations without any answer token after truncation; they are left out."""
    tokens: int = 0
    """Tokens in kept examples, after truncation."""
    targets: int = 0
    longest: int = 0
    """Length of the longest conversation, before truncation."""
    control_tokens: int = 0
    """Conversations whose own text spells a special token, which the model then reads as that token."""
    sequences: int = 0
    """Rows of the data set: the same as `kept`, or fewer if examples are packed."""
    shortest_useful: int = 0
    """The smallest max_length at which any conversation keeps an answer token."""
    refused: Counter[str] = field(default_factory=Counter)
    """Conversations that the template cannot render as they are, left out on request, by kind of problem."""
    split: int = 0
    """Conversations whose history the template rewrites, and which became one example per answer."""
    documents: int = 0
    """Rows of plain text, each of which became one example per block."""
    blocks: int = 0
    """Examples that they became."""

    def add(self, part: TokenizationReport) -> None:
        """Adds the counts of further rows."""
        for name in ("examples", "kept", "truncated", "tokens_cut", "dropped", "tokens", "targets", "control_tokens",
                     "split", "documents", "blocks"):  # fmt: skip
            setattr(self, name, getattr(self, name) + getattr(part, name))
        self.longest = max(self.longest, part.longest)
        useful = [length for length in (self.shortest_useful, part.shortest_useful) if length]
        self.shortest_useful = min(useful, default=0)
        self.refused += part.refused

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{self.kept:,} examples, {self.tokens:,} tokens, {self.targets:,} of them trained on"]
        if 0 < self.sequences < self.kept:
            filled = self.tokens / (self.sequences * self.max_length)
            parts.append(f"packed into {self.sequences:,} sequences ({filled:.1%} filled)")
        if self.truncated:
            parts.append(
                f"{self.truncated:,} cut at {self.max_length} tokens ({self.tokens_cut:,} tokens, the "
                f"longest had {self.longest:,})"
            )
        if self.dropped:
            parts.append(f"{self.dropped:,} of them dropped: no answer left")
        if self.refused:
            kinds = ", ".join(f"{count:,} x {kind}" for kind, count in self.refused.most_common())
            parts.append(f"{sum(self.refused.values()):,} left out by the template ({kinds})")
        if self.split:
            parts.append(f"{self.split:,} with history that the template rewrites became one example per answer")
        if self.documents:
            parts.append(
                f"{self.documents:,} texts became {self.blocks:,} blocks of at most {self.max_length} tokens, whole"
            )
        if self.control_tokens:
            parts.append(f"{self.control_tokens:,} spell a special token in their text")
        return "; ".join(parts)
