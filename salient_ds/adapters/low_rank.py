"""The low-rank update and its frozen layer in one autograd function.

Shape legend: I = in features, O = out features, R = rank, T = tokens (all leading axes flattened), x_BI: any leading
axes, then I.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def low_rank_linear(
    x_BI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, A_RI: Tensor, gain_R: Tensor | None, B_OR: Tensor
) -> Tensor:
    """W x + b + B diag(gain) A x, with gradients for x, A, gain and B; W and b are frozen. No gain: 1.

    Compared with separate calls, this saves two additions: one over tokens x O in the forward pass, one over tokens x I
    in the backward pass. The update is accumulated in place into the layer's output, and its input gradient into
    the layer's input gradient. For the backward pass, it keeps one tensor of tokens x R instead of two. All tensors
    have one dtype.
    """
    out: Tensor = _LowRankLinear.apply(x_BI, weight_OI, bias_O, A_RI, gain_R, B_OR)
    return out


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BI: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        A_RI: Tensor,
        gain_R: Tensor | None,
        B_OR: Tensor,
    ) -> Tensor:
        x_TI = x_BI.reshape(-1, x_BI.shape[-1])
        inner_TR = torch.mm(x_TI, A_RI.t())
        # not a view of another tensor: models may add to it in place, as llama4's layers of experts do
        out_BO = x_BI.new_empty(*x_BI.shape[:-1], len(weight_OI))
        out_TO = out_BO.view(-1, len(weight_OI))
        if bias_O is None:
            torch.mm(x_TI, weight_OI.t(), out=out_TO)
        else:
            torch.addmm(bias_O, x_TI, weight_OI.t(), out=out_TO)
        out_TO.addmm_(inner_TR if gain_R is None else inner_TR * gain_R, B_OR.t())
        ctx.save_for_backward(x_BI, weight_OI, A_RI, gain_R, B_OR, inner_TR)
        return out_BO

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x_BI, weight_OI, A_RI, gain_R, B_OR, inner_TR = ctx.saved_tensors
        grad_TO = grads[0].reshape(-1, grads[0].shape[-1])
        x_TI = x_BI.reshape(-1, x_BI.shape[-1])
        grad_outer_TR = torch.mm(grad_TO, B_OR)
        grad_B_OR = torch.mm(grad_TO.t(), inner_TR if gain_R is None else inner_TR * gain_R)
        grad_gain_R = None if gain_R is None else (grad_outer_TR * inner_TR).sum(0)
        grad_inner_TR = grad_outer_TR if gain_R is None else grad_outer_TR * gain_R
        grad_A_RI = torch.mm(grad_inner_TR.t(), x_TI)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.mm(grad_TO, weight_OI).addmm_(grad_inner_TR, A_RI).view_as(x_BI)
        return grad_x, None, None, grad_A_RI, grad_gain_R, grad_B_OR
