"""What the training loop counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """State of the training loop that a checkpoint keeps, besides that of the engine."""

    batches: int = 0
    """Number of global batches consumed, including those of skipped steps."""
    tokens: int = 0
    skipped_in_a_row: int = 0
