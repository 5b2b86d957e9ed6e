"""The orthogonality penalty's gradient for several factors of one flat parameter at once.

Shape legend: n = factors in a stack, R = rank of one, S = sum of their ranks, I = in features (B: out features O).
The numbers are those that :mod:`salient_ds.adapters.orthogonality` gives for every factor by itself, computed with a
fraction of the kernels. For example, the 448 factors of LLaMA-7B take 32 batched products instead of 448 small ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from salient_ds.adapters.orthogonality import OrthogonalityPenalty
from salient_ds.adapters.ranked_linear import RankedLinear


@dataclass
class Stack:
    """Adjacent factors of a flat parameter: all A (R, I) with the same I, or all B (O, R) with the same O."""

    adapters: tuple[RankedLinear, ...]
    rank_axis: int
    offset: int
    """First element in the flat parameter."""
    shapes: tuple[tuple[int, int], ...]
    slots: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Row in ``norms_M2`` of every factor (n,)."""
    off: Tensor | None = None
    """Residual elements to ignore: (n, R, R), or (S, S) if ranks differ. None: all count."""
    module_S: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """Index of the factor that each row belongs to (S,); only used if ranks differ."""
    minus_identity: Tensor | None = None
    """-I, to which Gram matrices are added: (1, R, R), or (1, S, S) if ranks differ."""

    @property
    def uniform(self) -> bool:
        return len(set(self.shapes)) == 1

    @property
    def ranks(self) -> list[int]:
        return [shape[self.rank_axis] for shape in self.shapes]

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)

    def add_gradient(self, penalty: OrthogonalityPenalty, flat: Tensor, grad: Tensor, accumulate: bool = True) -> None:
        """See :func:`add_penalty_gradient`."""
        add_penalty_gradient(penalty, self, flat, grad, accumulate)

    def refresh(self, device: torch.device) -> None:
        """Update everything that depends on the adapters' masks."""
        self.slots = torch.tensor([a.penalty_slot for a in self.adapters], device=device)
        masks = [a.penalised().to(device) for a in self.adapters]
        size = self.ranks[0] if self.uniform else sum(self.ranks)
        self.minus_identity = -torch.eye(size, device=device).unsqueeze(0)
        if self.uniform:
            live_nR = torch.stack(masks)
            everything = bool(live_nR.all())
            self.off = None if everything else ~(live_nR.unsqueeze(2) & live_nR.unsqueeze(1))
            return
        self.module_S = torch.repeat_interleave(torch.arange(len(masks)), torch.tensor(self.ranks)).to(device)
        live_S = torch.cat(masks)
        same_SS = self.module_S.unsqueeze(1) == self.module_S
        self.off = ~(same_SS & live_S.unsqueeze(1) & live_S)


def add_penalty_gradient(
    penalty: OrthogonalityPenalty, stack: Stack, flat: Tensor, grad: Tensor, accumulate: bool = True
) -> None:
    """Add the gradient of every factor's penalty to ``grad`` in place, and record the norms.

    Args:
        flat: the parameter that holds the factors.
        grad: its gradient, of the same size.
        accumulate: add to the values in ``grad``; otherwise overwrite them.
    """
    if stack.numel == 0:
        return
    if stack.uniform:
        _uniform(penalty, stack, flat, grad, accumulate)
    else:
        _ragged(penalty, stack, flat, grad, accumulate)


def _uniform(penalty: OrthogonalityPenalty, stack: Stack, flat: Tensor, grad: Tensor, accumulate: bool) -> None:
    shape = (len(stack.shapes), *stack.shapes[0])
    span = slice(stack.offset, stack.offset + stack.numel)
    factor, target = flat[span].view(shape), grad[span].view(shape)
    wide = factor if stack.rank_axis == 0 else factor.transpose(1, 2)
    assert stack.minus_identity is not None
    residual_nRR = _gram_minus(wide, stack.minus_identity)
    if stack.off is not None:
        residual_nRR.masked_fill_(stack.off, 0.0)
    norm_n = torch.linalg.vector_norm(residual_nRR, dim=(1, 2))
    penalty.note(stack.slots, stack.rank_axis, norm_n)
    if penalty.coefficient == 0:
        return
    scaled_nRR = torch.empty_like(residual_nRR, dtype=flat.dtype)  # scaled and cast by one kernel
    torch.mul(residual_nRR, penalty.gradient_factor(norm_n).view(-1, 1, 1), out=scaled_nRR)
    pair = (scaled_nRR, factor) if stack.rank_axis == 0 else (factor, scaled_nRR)
    target.baddbmm_(*pair, beta=int(accumulate))


def _ragged(penalty: OrthogonalityPenalty, stack: Stack, flat: Tensor, grad: Tensor, accumulate: bool) -> None:
    """Ranks differ: form one product over all rows, of which only the diagonal blocks count."""
    assert stack.off is not None
    span = slice(stack.offset, stack.offset + stack.numel)
    sizes = [math.prod(shape) for shape in stack.shapes]
    if stack.rank_axis == 0:
        wide_SI = flat[span].view(-1, stack.shapes[0][1])
    else:
        pieces = zip(flat[span].split(sizes), stack.shapes, strict=True)
        wide_SI = torch.cat([piece.view(shape) for piece, shape in pieces], dim=1).t()
    assert stack.minus_identity is not None
    residual_SS = _gram_minus(wide_SI.unsqueeze(0), stack.minus_identity)[0]
    residual_SS.masked_fill_(stack.off, 0.0)
    square_n = torch.zeros(len(stack.shapes), device=flat.device)
    square_n.index_add_(0, stack.module_S, residual_SS.square().sum(1))
    norm_n = square_n.sqrt()
    penalty.note(stack.slots, stack.rank_axis, norm_n)
    if penalty.coefficient == 0:
        return
    weight_S = penalty.gradient_factor(norm_n)[stack.module_S]
    scaled_SS = residual_SS.mul_(weight_S.unsqueeze(1)).to(flat.dtype)
    if stack.rank_axis == 0:
        grad[span].view_as(wide_SI).addmm_(scaled_SS, wide_SI, beta=int(accumulate))
        return
    extra = torch.mm(wide_SI.t(), scaled_SS).split(stack.ranks, dim=1)
    targets = [t.view(shape) for t, shape in zip(grad[span].split(sizes), stack.shapes, strict=True)]
    if accumulate:
        torch._foreach_add_(targets, list(extra))
    else:
        torch._foreach_copy_(targets, list(extra))


def _gram_minus(wide_nRI: Tensor, minus_identity: Tensor) -> Tensor:
    """W W^T - I of every factor in fp32, (n, R, R)."""
    start = minus_identity.expand(len(wide_nRI), -1, -1)
    if wide_nRI.is_cuda and wide_nRI.dtype != torch.float32:
        # bf16 operands, fp32 accumulation and result: products of two bf16 numbers are exact in fp32
        return torch.baddbmm(start, wide_nRI, wide_nRI.transpose(1, 2), out_dtype=torch.float32)
    wide = wide_nRI.float()
    return torch.baddbmm(start, wide, wide.transpose(1, 2))
