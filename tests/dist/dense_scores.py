"""Scores of whole matrices the way a textbook would: inputs and output gradients kept, the dense gradient in full."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from salient_ds.adapters.growing import GrowingLinear
from salient_ds.adapters.inject import AdaptedModel
from salient_ds.adapters.module_score import ModuleScores
from salient_ds.adapters.ranked_linear import RankedLinear

TakeGradient = Callable[[int, Tensor], Any]
"""Number of a matrix, and dL/ddW (O, I) of one forward pass through it."""


def watch_gradients(adapters: Sequence[RankedLinear], take: TakeGradient) -> list[RemovableHandle]:
    """Show ``take`` the dense gradient of every forward pass from now on, when it is walked back."""
    return [adapter.register_forward_hook(_forward_hook(k, take)) for k, adapter in enumerate(adapters)]


def _forward_hook(k: int, take: TakeGradient) -> Any:
    def forward(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x_TI = inputs[0].detach().flatten(0, -2)

        def backward(grad: Tensor) -> None:
            take(k, grad.flatten(0, -2).t() @ x_TI)

        output.register_hook(backward)

    return forward


def dense_score(adapter: RankedLinear, gradient_OI: Tensor) -> Tensor:
    """sum |dW o dL/ddW| / sqrt(O I)."""
    assert isinstance(adapter, GrowingLinear)
    with torch.no_grad():
        delta_OI = (adapter.lora_B * adapter.sigma() * adapter.scaling) @ adapter.lora_A
        return (delta_OI * gradient_OI).abs().sum().double() / math.sqrt(delta_OI.numel())


class DenseScores(ModuleScores):
    """In place of ``adapted.scores``: for every armed step the scores of its forward passes, summed."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self.adapters = list(adapted.adapters.values())
        super().__init__(len(self.adapters), 0)
        self.history: list[Tensor] = []
        """Scores (M,) of every step that was armed."""
        self._handles: list[RemovableHandle] = []

    def arm(self, gradient_scale: float, device: torch.device, average: Any) -> None:
        """Before the forward passes of a step."""
        assert gradient_scale == 1.0 and average is None
        super().arm(gradient_scale, device, average)
        self._handles = watch_gradients(self.adapters, self._add)

    def disarm(self) -> None:
        super().disarm()
        for handle in self._handles:
            handle.remove()
        self.history.append(self.score_M)

    def _add(self, k: int, gradient_OI: Tensor) -> None:
        self.score_M[k] += dense_score(self.adapters[k], gradient_OI)
