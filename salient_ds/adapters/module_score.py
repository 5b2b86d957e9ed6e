"""How much the loss depends on the whole update of a matrix: IncreLoRA's score, without ever holding its gradient.

Shape legend: I/O = in/out features, R = rows, T = tokens of one forward pass, M = adapted matrices, o = output rows of
one block, x_BI: any leading axes, then I.

The gradient of the loss with respect to a dense update dW (O, I) is G = gy^T x: gradient of the output times input. It
is formed where the backward pass has both, a block of output rows at a time. One scored backward pass costs a product
of T x I x O per matrix, as much as the frozen layer's own forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Average = Callable[[Tensor], None]
"""In place: the mean of a tensor over all processes."""


class ModuleScores:
    """Controller shared by all adapters of a model; the training loop arms it for the backward passes of a step."""

    def __init__(self, num_modules: int, block_bytes: int) -> None:
        self.num_modules = num_modules
        self.block_bytes = block_bytes
        self.armed = False
        self.gradient_scale = 1.0
        self.average: Average | None = None
        self.score_M = torch.zeros(num_modules, dtype=torch.float64)
        """Scores of the backward passes since :meth:`arm`, summed."""

    def arm(self, gradient_scale: float, device: torch.device, average: Average | None) -> None:
        """Score every backward pass until :meth:`disarm`.

        Args:
            gradient_scale: factor between the gradients that are meant and those that backward propagates (fp16).
            average: combines a block of the gradient over processes before its absolute value is taken; None: each
                process scores its own part of the batch.
        """
        self.armed = True
        self.gradient_scale = gradient_scale
        self.average = average
        self.score_M = torch.zeros(self.num_modules, dtype=torch.float64, device=device)

    def disarm(self) -> None:
        self.armed = False

    def watch(self, update_BO: Tensor, x_BI: Tensor, A_RI: Tensor, B_OR: Tensor, gain_R: Tensor, module: int) -> Tensor:
        """Return ``update_BO`` unchanged, with the scoring of ``module`` hooked to its backward when armed.

        ``A_RI`` and ``B_OR`` must be the leaf parameters themselves: ZeRO-3 re-gathers a saved parameter for backward.

        Args:
            update_BO: the adapter's output B diag(gain) A x.
            gain_R: singular values times scaling.
        """
        if not self.armed:
            return update_BO
        out: Tensor = _Watch.apply(update_BO, x_BI, A_RI, B_OR, gain_R.detach(), module, self)
        return out


def module_score(
    x_TI: Tensor,
    grad_TO: Tensor,
    factors: tuple[Tensor, Tensor, Tensor],
    block_bytes: int,
    average: Average | None = None,
) -> Tensor:
    """sum |dW o G| / sqrt(O I) with dW = B diag(gain) A and G = grad^T x, 0-dim float64.

    Source: the released code of IncreLoRA (the paper's formula was not at hand). Differs from the reference: there dW
    and G are dense (O, I) tensors, here blocks of both take at most ``block_bytes`` (one row of them at the least).

    Args:
        factors: A (R, I), B (O, R), gain (R,).
    """
    A_RI, B_OR, gain_R = factors
    wide = x_TI.shape[1]
    rows = max(1, block_bytes // (2 * 4 * wide))
    A_RI, gain_R = A_RI.float(), gain_R.float()
    total = torch.zeros((), dtype=torch.float64, device=x_TI.device)
    for lo in range(0, len(B_OR), rows):
        block_oI = _product(grad_TO[:, lo : lo + rows].t(), x_TI)
        if average is not None:
            average(block_oI)
        delta_oI = (B_OR[lo : lo + rows].float() * gain_R) @ A_RI
        total += block_oI.mul_(delta_oI).abs_().sum(dtype=torch.float64)
    return total / math.sqrt(wide * len(B_OR))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product with fp32 sum and result."""
    if left.is_cuda and left.dtype != torch.float32:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        update_BO: Tensor,
        x_BI: Tensor,
        A_RI: Tensor,
        B_OR: Tensor,
        gain_R: Tensor,
        module: int,
        scores: ModuleScores,
    ) -> Tensor:
        ctx.save_for_backward(x_BI, A_RI, B_OR, gain_R)
        ctx.module, ctx.scores = module, scores
        return update_BO.view_as(update_BO)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_BI, A_RI, B_OR, gain_R = (t.detach() for t in ctx.saved_tensors)
        scores: ModuleScores = ctx.scores
        grad_TO = grads[0].reshape(-1, len(B_OR))
        x_TI = x_BI.reshape(-1, A_RI.shape[1])
        score = module_score(x_TI, grad_TO, (A_RI, B_OR, gain_R), scores.block_bytes, scores.average)
        scores.score_M[ctx.module] += score / scores.gradient_scale
        return grads[0], None, None, None, None, None, None
