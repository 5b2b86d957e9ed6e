"""Fold an adapter's scale and singular values into two plain LoRA factors. Pure torch.

Shape legend: I = in features, O = out features, R = initial rank, r = live rank (rows that the mask keeps).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdapterFactors:
    """One trained adapter: the update of ``name`` is scaling * B diag(E * mask) A.

    Raises:
        ValueError: if shapes do not fit together.
    """

    name: str
    """Full module path in the base model, e.g. "model.layers.0.self_attn.q_proj"."""
    A: Tensor
    """(R, I)"""
    E: Tensor | None
    """(R,) singular values; None for the plain form B A."""
    B: Tensor
    """(O, R)"""
    mask: Tensor
    """(R,) bool, True = live."""
    scaling: float

    def __post_init__(self) -> None:
        rank = self.mask.shape[0] if self.mask.dim() == 1 else -1
        fits = self.A.dim() == 2 and self.B.dim() == 2 and self.A.shape[0] == rank == self.B.shape[1]
        if not fits or (self.E is not None and self.E.shape != (rank,)):
            tensors = {"A": self.A, "E": self.E, "B": self.B, "mask": self.mask}
            shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in tensors.items() if value is not None)
            raise ValueError(
                f"factors of {self.name!r} do not fit together: {shapes}; "
                "expected A (R, I), E (R,), B (O, R), mask (R,)"
            )
        if self.mask.dtype != torch.bool:
            raise ValueError(f"mask of {self.name!r} has dtype {self.mask.dtype}, expected torch.bool")

    @property
    def rank(self) -> int:
        """Number of live rows."""
        return int(self.mask.sum())


@dataclass(frozen=True)
class LoraPair:
    """A plain LoRA update B A (scale 1), fp32 on the CPU."""

    name: str
    A_rI: Tensor
    B_Or: Tensor

    @property
    def rank(self) -> int:
        return self.A_rI.shape[0]


def fold(factors: AdapterFactors) -> LoraPair | None:
    """Drop masked rows, and fold E and the scaling into the two factors.

    Returns None if no row is live, because PEFT and vLLM refuse rank 0. Live rows stay even where E is exactly 0: the
    rank is a decision of the allocator, not a coincidence of values.

    The gain g = scaling * E of a row is split between A and B, so that the row of A and the column of B have about the
    same root mean square, sqrt(rms(A) * |g| * rms(B)). With g on one side only, small singular values would reach the
    subnormal numbers of fp16 (below 6e-5) far earlier. A's share is rounded to a power of two. So A is exact, and each
    element of B carries two fp32 roundings (of g and of the product).

    Raises:
        ValueError: a live row holds NaN or infinity.
    """
    live = factors.mask.nonzero().flatten()
    if live.numel() == 0:
        return None
    A_rI = factors.A.detach()[live.to(factors.A.device)].float().cpu()
    B_Or = factors.B.detach()[:, live.to(factors.B.device)].float().cpu()
    gain_r = torch.full((live.numel(),), factors.scaling, dtype=torch.float32)
    if factors.E is not None:
        gain_r = factors.E.detach()[live.to(factors.E.device)].float().cpu() * factors.scaling
    share_r = _power_of_two_share(A_rI, gain_r, B_Or)
    pair = LoraPair(factors.name, A_rI * share_r.unsqueeze(1), B_Or * (gain_r / share_r))
    if not (pair.A_rI.isfinite().all() and pair.B_Or.isfinite().all()):
        raise ValueError(f"adapter {factors.name!r} holds NaN or infinity in a live row: export an earlier checkpoint")
    return pair


def _power_of_two_share(A_rI: Tensor, gain_r: Tensor, B_Or: Tensor) -> Tensor:
    """2^k per row, so that A * 2^k and B * g / 2^k have about the same root mean square. 1 for rows without effect."""
    rms_A_r = A_rI.double().square().mean(1).sqrt()
    rms_B_r = B_Or.double().square().mean(0).sqrt() * gain_r.double().abs()
    exponent_r = torch.log2(rms_B_r / rms_A_r).div(2).round().clamp(-64, 64)
    return torch.where(exponent_r.isfinite() & (rms_A_r > 0) & (rms_B_r > 0), exponent_r.exp2(), 1.0).float()


def delta_weight(pair: LoraPair) -> Tensor:
    """The dense update B A of the weight matrix, (O, I) in fp32."""
    return pair.B_Or @ pair.A_rI
