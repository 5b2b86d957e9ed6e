"""IncreLoRA's score: how much the loss depends on a matrix's whole update, without ever storing the full gradient.

Shape legend: I/O = in/out features, R = rows, T = tokens of one forward pass, M = adapted matrices, o = output rows of
one block, x_BI: any leading axes, then I.

The gradient of the loss with respect to a dense update dW (O, I) is G = gy^T x, where gy is the gradient of the output
and x the input. It is formed in the backward pass, which has both, one block of output rows at a time. Scoring one
backward pass costs a product of T x I x O per matrix, as much as the frozen layer's own forward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Average = Callable[[Tensor], None]
"""Replaces a tensor by its mean over all processes, in place."""


class ModuleScores:
    """Controller shared by all adapters of a model. The training loop arms it for the backward passes of a step."""

    def __init__(self, num_modules: int, block_bytes: int) -> None:
        self.num_modules = num_modules
        self.block_bytes = block_bytes
        self.armed = False
        self.gradient_scale = 1.0
        self.average: Average | None = None
        self.score_M = torch.zeros(num_modules, dtype=torch.float64)
        """Sum of the scores of all backward passes since :meth:`arm`, float64."""

    def arm(self, gradient_scale: float, device: torch.device, average: Average | None) -> None:
        """Score every backward pass until :meth:`disarm`.

        Args:
            gradient_scale: factor by which the gradients of the backward pass are too large (the fp16 loss scale).
            average: averages each block of the gradient over processes before the absolute value is taken. None: each
                process scores the gradient of its own part of the batch.
        """
        self.armed = True
        self.gradient_scale = gradient_scale
        self.average = average
        self.score_M = torch.zeros(self.num_modules, dtype=torch.float64, device=device)

    def disarm(self) -> None:
        self.armed = False

    def watch(self, update_BO: Tensor, x_BI: Tensor, A_RI: Tensor, B_OR: Tensor, gain_R: Tensor, module: int) -> Tensor:
        """Return ``update_BO`` unchanged. If armed, hook the scoring of ``module`` to its backward pass.

        If ZeRO-3 partitions the adapters, ``A_RI`` and ``B_OR`` must be the leaf parameters themselves: it gathers a
        saved parameter again for the backward pass, but not a tensor derived from one.

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
    """sum |dW o G| / sqrt(O I) with dW = B diag(gain) A and G = grad^T x, as a 0-dim float64 tensor.

    Source: the released code of IncreLoRA (the paper's formula was not at hand). Differs from the reference: there dW
    and G are dense (O, I) tensors. Here they are formed in blocks of rows, which take at most ``block_bytes`` for both
    together (but at least one row of each).

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
    """Matrix product with fp32 accumulation and result."""
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
