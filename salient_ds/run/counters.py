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
    skipped: int = 0
    """Number of skipped steps of the whole run."""

    def count(self, skipped: bool) -> None:
        """Count a batch, and whether its step was skipped."""
        self.batches += 1
        self.skipped += skipped
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0

    def skips(self) -> str:
        """Why a step was skipped, and how many were, for people."""
        return f"its gradients are not finite ({self.skipped} of {self.batches} batches so far)"
