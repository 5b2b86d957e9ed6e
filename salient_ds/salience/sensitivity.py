"""AdaLoRA's statistic: smoothed sensitivity of the loss to parameters, and its mean over each rank of a factor.

Shape legend: n = elements of one part (any piece of a flattened factor that one process owns), R = ranks of the
factor. Everything is elementwise until :func:`row_means`, so no shard needs to know another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from salient_ds.ranks import Part

CHUNK = 2**24
"""Elements whose temporaries may exist at once (64 MiB). Bounds the memory of an update."""


@dataclass
class Smoothed:
    """State for a list of tensors, each of one part or of neighbouring parts. Both lists have one entry per tensor."""

    sensitivity: list[Tensor]
    """Ibar (n,) fp32 each: moving average of |w g|."""
    uncertainty: list[Tensor]
    """Ubar (n,) fp32 each: moving average of how far |w g| lies from Ibar."""

    @property
    def nbytes(self) -> int:
        """Memory of the state: twice that of the observed fp32 masters."""
        return sum(t.nbytes for t in self.sensitivity + self.uncertainty)


def init(values: Sequence[Tensor]) -> Smoothed:
    """State before the first step: zeros. There is no bias correction later (as in the paper and its code)."""
    return Smoothed(*([torch.zeros_like(v, dtype=torch.float32) for v in values] for _ in range(2)))


def update(
    state: Smoothed, values: list[Tensor], grads: list[Tensor], beta1: float, beta2: float, fused: bool = False
) -> Smoothed:
    """Take in one step, in place (AdaLoRA, Zhang et al. 2023, Eq. 8 to 10).

    I = |w g|; Ibar <- beta1 Ibar + (1 - beta1) I; Ubar <- beta2 Ubar + (1 - beta2) |I - Ibar| with the new Ibar.

    Args:
        values: weights w of every part (n,).
        grads: their gradients g, unscaled and clipped (n,).
        fused: do it in one pass on CUDA devices (:mod:`salient_ds.salience.sensitivity_kernel`, needs triton).
    """
    assert len(state.sensitivity) == len(values) == len(grads)
    if fused and values and values[0].is_cuda:
        from salient_ds.salience.sensitivity_kernel import AVAILABLE, update_span

        if AVAILABLE:
            for each in zip(state.sensitivity, state.uncertainty, values, grads, strict=True):
                update_span(*each, beta1, beta2)
            return state
    values, grads, means, spreads = (_cut(list_) for list_ in (values, grads, state.sensitivity, state.uncertainty))
    for span in _chunks(values):
        now = torch._foreach_mul(values[span], grads[span])  # one launch for many small parts
        torch._foreach_abs_(now)
        torch._foreach_mul_(means[span], beta1)
        torch._foreach_add_(means[span], now, alpha=1 - beta1)
        torch._foreach_sub_(now, means[span])
        torch._foreach_abs_(now)
        torch._foreach_mul_(spreads[span], beta2)
        torch._foreach_add_(spreads[span], now, alpha=1 - beta2)
    return state


def update_squares(state: Smoothed, values: list[Tensor], grads: list[Tensor], beta1: float) -> Smoothed:
    """Take in one step, in place: Ibar <- beta1 Ibar + (1 - beta1)(w g)^2, and Ubar is 1.

    The product is then the "gate Fisher" of a weight: how fast the loss changes if it is scaled, squared and averaged.
    """
    if not values:
        return state
    squares = torch._foreach_mul(values, grads)
    torch._foreach_mul_(squares, squares)
    torch._foreach_mul_(state.sensitivity, beta1)
    torch._foreach_add_(state.sensitivity, squares, alpha=1 - beta1)
    for ones in state.uncertainty:
        ones.fill_(1.0)
    return state


def by_part(state: Smoothed, spans: Sequence[Sequence[Part]]) -> Iterator[tuple[Part, Tensor, Tensor]]:
    """Every part with its views of Ibar and Ubar, (n,) each.

    Args:
        spans: the parts that lie in each of the state's tensors, in order.
    """
    for span, sensitivity_n, uncertainty_n in zip(spans, state.sensitivity, state.uncertainty, strict=True):
        sizes = [part.numel for part in span]
        yield from zip(span, sensitivity_n.split(sizes), uncertainty_n.split(sizes), strict=True)


def row_scores(state: Smoothed, spans: Sequence[Sequence[Part]]) -> Iterator[tuple[Part, Tensor]]:
    """Every part with its share of the mean of Ibar Ubar over each rank's elements, (R,) float64.

    The sum of the shares over all parts of a factor, on any number of processes, is the factor's contribution to the
    scores (Eq. 7 and 11).
    """
    for part, sensitivity_n, uncertainty_n in by_part(state, spans):
        yield part, row_means(part, sensitivity_n * uncertainty_n)


def row_means(part: Part, value_n: Tensor) -> Tensor:
    """This part's share of the mean of a factor over each of its ranks, (R,) float64.

    A part may begin and end in the middle of a line of the (row-major) factor. So it is cut into at most three pieces,
    of which the middle one is a matrix of whole lines. No index tensor as large as the part is needed.
    """
    assert part.rank_axis in (0, 1), "a factor that all ranks share has no score"
    line = math.prod(part.shape[1:])
    ranks = part.shape[part.rank_axis]
    first, start = divmod(part.lo, line)
    head = min(part.numel, (line - start) % line)
    whole = (part.numel - head) // line
    head_n, body_n, tail_n = value_n.split([head, whole * line, part.numel - head - whole * line])
    body_nl = body_n.view(whole, line)
    sum_R = torch.zeros(ranks, dtype=torch.float64, device=value_n.device)
    if part.rank_axis == 0:
        lines = first + bool(head)
        sum_R[first : first + 1] += head_n.sum(dtype=torch.float64)
        sum_R[lines : lines + whole] += body_nl.sum(1, dtype=torch.float64)
        sum_R[lines + whole : lines + whole + 1] += tail_n.sum(dtype=torch.float64)
    else:
        sum_R[start : start + head] += head_n
        sum_R += body_nl.sum(0, dtype=torch.float64)
        sum_R[: len(tail_n)] += tail_n
    return sum_R / (math.prod(part.shape) // ranks)


def _cut(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors in order, those with more than CHUNK elements as several slices."""
    return [piece for tensor in tensors for piece in tensor.split(max(1, CHUNK))]


def _chunks(values: Sequence[Tensor]) -> Iterator[slice]:
    """Consecutive tensors with at most CHUNK elements together."""
    start = filled = 0
    for index, value in enumerate(values):
        if filled and filled + value.numel() > CHUNK:
            yield slice(start, index)
            start, filled = index, 0
        filled += value.numel()
    if filled:
        yield slice(start, len(values))
