"""What arms of other libraries have in common: a model in an engine, and no events."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .timing import Stopwatch


@dataclass
class PeerArm:
    """A model of another library in its engine."""

    engine: Any
    watch: Stopwatch

    def step(self, tokens_BS: Tensor) -> Tensor:
        """Run one optimizer step and return its loss (device tensor)."""
        loss = self.forward_backward(tokens_BS)
        with self.watch.part("step"):
            self.engine.step()
        return loss

    def forward_backward(self, tokens_BS: Tensor) -> Tensor:
        """Run forward and backward pass and return the loss, detached."""
        with self.watch.part("forward"):
            loss: Tensor = self.engine(input_ids=tokens_BS, labels=tokens_BS).loss
        with self.watch.part("backward"):
            self.engine.backward(loss)
        return loss.detach()

    def loss(self, tokens_BS: Tensor) -> float:
        return float(self.step(tokens_BS))

    def facts(self) -> dict[str, Any]:
        return {"compacted": False}

    def run_schedule(self, tokens_BS: Tensor, log: Any = None) -> dict[str, Any]:
        """Return nothing: there are no events. PEFT's AdaLoRA allocates in every step."""
        return {}
