"""Two-scale adapters of a bank: the inner factors are multiplied out before the forward pass, for all adapters at once.

bb aa diag(gain) B A = bb A' with A' = (aa diag(gain) B) A, (k, I). So an adapter computes one product of tokens with A'
and one with bb, as LoRA of rank k, whatever R is. aa diag(gain) B is (k, k), and is formed in fp32 for all adapters of
a bank by one batched product. Gradients of A' go back to A, aa, gain and B in the same way.

Shape legend: N = adapters of the bank, n = those of one block, R = rank, k = inner width, I/O = in/out features, L =
singular values of the bank (N R).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from salient_ds.adapters.ranked_linear import RankedLinear
from salient_ds.adapters.slots import Slot
from salient_ds.adapters.two_scale import TwoScaleLinear
from salient_ds.adapters.two_scale_stack import TwoScaleStack

AddPenalty = Callable[[Tensor], None]
"""Adds the penalty's gradient to that of the flat parameter, in place."""


def two_scale_stack(adapters: Sequence[RankedLinear], slots: Sequence[Slot]) -> TwoScaleStack | None:
    """The stack of a bank of two-scale adapters; None for other forms, and for ranks that differ or are 0."""
    members = [adapter for adapter in adapters if type(adapter) is TwoScaleLinear]
    shapes = {(adapter.rank, adapter.inner_width) for adapter in members}
    if len(members) < len(adapters) or len(shapes) != 1 or 0 in next(iter(shapes)):
        return None
    return TwoScaleStack(members, slots)


def merge(factors: Tensor, sigmas: Tensor, gain_L: Tensor, stack: TwoScaleStack, penalty: AddPenalty | None) -> None:
    """Give every adapter A' and bb for this forward pass. Their gradients flow back to ``factors`` and ``sigmas``.

    Args:
        gain_L: mask times scaling of every singular value.
        penalty: adds the penalty's gradient in the backward pass; None: it does not act.
    """
    pieces = _Merge.apply(factors, sigmas, gain_L, stack, penalty)
    count = len(stack.adapters)
    for adapter, merged_kI, bb_Ok in zip(stack.adapters, pieces[:count], pieces[count:], strict=True):
        if adapter.merged_kI is None:  # else they would keep the memory of parameters that an engine has moved
            for name in ("A", "B", "aa"):
                object.__setattr__(adapter, f"lora_{name}", factors.new_empty(0))
        object.__setattr__(adapter, "merged_kI", merged_kI)
        object.__setattr__(adapter, "lora_bb", bb_Ok)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, factors: Tensor, sigmas: Tensor, gain_L: Tensor, stack: TwoScaleStack, penalty: AddPenalty | None
    ) -> tuple[Tensor, ...]:
        B_NRk, aa_NkR = stack.joined("B", factors), stack.joined("aa", factors)
        gain_NR = (sigmas.float() * gain_L).view(B_NRk.shape[:2])
        middle_Nkk = (aa_NkR * gain_NR.unsqueeze(1)) @ B_NRk
        ctx.save_for_backward(factors, middle_Nkk, gain_NR, gain_L)
        ctx.stack, ctx.penalty = stack, penalty
        merged, outer = [factors] * len(stack.adapters), [factors] * len(stack.adapters)
        for block in stack.blocks["A"]:
            product = torch.bmm(stack.pick(middle_Nkk, block), block.view(factors).float())
            _spread(merged, block.members, stack.stored(block, product, factors.dtype))
        for block in stack.blocks["bb"]:
            _spread(outer, block.members, block.view(factors))
        return (*merged, *outer)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        factors, middle_Nkk, gain_NR, gain_L = ctx.saved_tensors
        stack: TwoScaleStack = ctx.stack
        count = len(stack.adapters)
        flat = torch.empty_like(factors)
        pieces = []
        for block in stack.blocks["A"]:
            A_nkI, grad_nkI = block.view(factors).float(), _together(grads[:count], block.members, block.shape, factors)
            pieces.append((block, torch.bmm(grad_nkI, A_nkI.mT)))
            block.view(flat).copy_(torch.bmm(stack.pick(middle_Nkk, block).mT, grad_nkI))
        for block in stack.blocks["bb"]:
            block.view(flat).copy_(_together(grads[count:], block.members, block.shape, factors))
        grad_Nkk = stack.scatter(pieces, middle_Nkk)
        B_NRk, aa_NkR = stack.joined("B", factors), stack.joined("aa", factors)
        pulled_NRk = aa_NkR.mT @ grad_Nkk
        stack.write("B", pulled_NRk * gain_NR.unsqueeze(2), flat, accumulate=False)
        stack.write("aa", (grad_Nkk @ B_NRk.mT) * gain_NR.unsqueeze(1), flat, accumulate=False)
        grad_L = (pulled_NRk * B_NRk).sum(2).view(-1) * gain_L
        if ctx.penalty is not None:
            ctx.penalty(flat)
        return flat, grad_L.to(factors.dtype), None, None, None


def _spread(into: list[Tensor], members: list[int], stacked: Tensor) -> None:
    for position, one in zip(members, stacked.unbind(0), strict=True):
        into[position] = one


def _together(grads: Sequence[Tensor | None], members: list[int], shape: tuple[int, int], like: Tensor) -> Tensor:
    """The gradients of a block's factors (n, *shape), fp32; a missing one becomes zeros."""
    found = [grads[position] for position in members]
    return torch.stack([like.new_zeros(shape) if grad is None else grad.reshape(shape) for grad in found]).float()
