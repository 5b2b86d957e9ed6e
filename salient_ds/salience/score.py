"""The score that SalientLoRA ranks by: orthogonality-weighted magnitude and influence, normalised and combined.

Shape legend: N = ranked singular values in module-major order, M = adapted matrices, T = steps of the window,
K = 1 (one history of losses for all matrices) or M (one each). ``sizes`` are the numbers of ranked values
per matrix, sum = N.

Results have the precision of the losses: float64, or float32 to reproduce the released code up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor


def orthogonality_losses(norms_TM2: Tensor, per_module: bool) -> Tensor:
    """Orthogonality loss of every step, from ||A A^T - I||_F and ||B^T B - I||_F per matrix.

    Per module (paper): R = ||A A^T - I||_F^2 + ||B^T B - I||_F^2 of each matrix, (M, T).
    Global (released code): mean of the norms, not squared, over all factors of all matrices, (1, T).
    """
    if per_module:
        return norms_TM2.square().sum(2).T
    return norms_TM2.double().mean((1, 2))[None].to(norms_TM2.dtype)


def loss_weights(losses_KT: Tensor, constant: Literal["uniform", "nan"]) -> Tensor:
    """Weight of each step in [0, 1]: sum(L) / L_t, min-max scaled over the window (Ke et al., NeurIPS 2024).

    The most orthogonal step gets 1, the least orthogonal one 0. If all losses of a history are equal, min-max
    scaling is 0/0. Then ``uniform`` makes all weights 1, and ``nan`` leaves NaN (released code: every score becomes
    NaN, and all values are masked).
    """
    if constant == "uniform":
        # A matrix that has lost all its rows has loss 0. In the limit of small losses, its steps count fully.
        losses_KT = losses_KT.clamp(min=torch.finfo(losses_KT.dtype).tiny)
        # the minimum, not the sum, which extreme losses would make overflow; min-max scaling gives the same weights
        inverse_KT = losses_KT.amin(1, keepdim=True) / losses_KT
    else:
        # one after the other, as the released code adds them: the weights then agree to the last bit
        inverse_KT = reduce(torch.add, losses_KT.split(1, 1)) / losses_KT
    low_K1, high_K1 = inverse_KT.amin(1, keepdim=True), inverse_KT.amax(1, keepdim=True)
    weights_KT = (inverse_KT - low_K1) / (high_K1 - low_K1)
    if constant == "uniform":
        weights_KT = torch.where(high_K1 == low_K1, torch.ones_like(weights_KT), weights_KT)
    return weights_KT


def magnitude(window_NT: Tensor, weights_KT: Tensor, sizes: Sequence[int], signed: bool = False) -> Tensor:
    """Weighted sum over time of every value, m_i = sum_t w_t |sigma_it| (or of sigma_it itself), (N,).

    The paper prints sigma_it without the absolute value; the released code takes the absolute value.
    """
    values_NT = window_NT if signed else window_NT.abs()
    if len(weights_KT) > 1:
        weights_KT = weights_KT.repeat_interleave(torch.tensor(sizes, device=weights_KT.device), 0)
    # step after step, as the released code adds: the same on every device, and no second window in memory
    total_N = torch.zeros(len(window_NT), dtype=weights_KT.dtype, device=window_NT.device)
    for values_N1, weights_K1 in zip(values_NT.split(1, 1), weights_KT.split(1, 1), strict=True):
        total_N += values_N1[:, 0] * weights_K1[:, 0]
    return total_N


def per_module_share(magnitude_N: Tensor, sizes: Sequence[int]) -> Tensor:
    """Magnitude divided by the sum of absolute magnitudes in its matrix, (N,); NaN if that sum is 0."""
    # one sum per matrix instead of a scatter: atomic additions would differ from process to process
    sums_M = torch.stack([part.abs().sum() for part in magnitude_N.split(list(sizes))])
    return magnitude_N / sums_M.repeat_interleave(torch.tensor(sizes, device=sums_M.device))


def global_share(influence_N: Tensor) -> Tensor:
    """Influence divided by the sum of all influences, (N,); 0 if that sum is 0 (no edge, and leaves count 0)."""
    total = influence_N.sum()
    return torch.where(total > 0, influence_N / total, torch.zeros_like(influence_N))


def percentile(value_N: Tensor) -> Tensor:
    """Fraction of values below each one, plus half of the equal ones, (N,) float64; NaN stays NaN."""
    if len(value_N) == 0:
        return value_N.double()
    _, inverse_N, counts = torch.unique(value_N, return_inverse=True, return_counts=True)
    middle = counts.cumsum(0).double() - counts.double() / 2
    return torch.where(value_N.isnan(), torch.nan, middle[inverse_N] / len(value_N))


def normalise(
    magnitude_N: Tensor,
    influence_N: Tensor,
    how: Literal["printed", "released", "robust"],
    sizes: Sequence[int],
    zero_over_zero: Literal["zero", "nan"],
) -> tuple[Tensor, Tensor]:
    """Bring magnitude and influence to one scale, both (N,) in the magnitude's precision.

    - printed: unchanged, because the paper names no normalisation. Influences reach 1e24, and then decide alone.
    - released: magnitude as a share within its matrix, influence as a share of all.
    - robust: percentiles over all ranked values, for both terms.
    """
    if how == "released":
        magnitude_N = per_module_share(magnitude_N, sizes)
        if zero_over_zero == "zero":
            magnitude_N = magnitude_N.nan_to_num(nan=0.0)
        influence_N = global_share(influence_N)
    elif how == "robust":
        dtype = magnitude_N.dtype
        magnitude_N, influence_N = percentile(magnitude_N).to(dtype), percentile(influence_N)
    return magnitude_N, influence_N.to(magnitude_N.dtype)


def combine(magnitude_N: Tensor, influence_N: Tensor, how: Literal["mix", "sum"], lambda_: float) -> Tensor:
    """The score (N,): lambda m + (1 - lambda) I (paper), or m + I (released code, which ignores lambda)."""
    if how == "sum":
        return magnitude_N + influence_N
    return lambda_ * magnitude_N + (1 - lambda_) * influence_N
