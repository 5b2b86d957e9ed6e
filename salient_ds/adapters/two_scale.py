"""The two-scale form of LoRA^2 around one frozen linear layer.

Shape legend: I = in features, O = out features, R = initial rank, k = inner width, x_BI: any leading axes, then I.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salient_ds.adapters.orthogonality import OrthogonalityPenalty, TwoScaleFactors
from salient_ds.adapters.ranked_linear import RankedLinear, with_gain


class TwoScaleLinear(RankedLinear):
    """y = W0 x + b + scaling * bb aa diag(E * mask) B A dropout(x)  (LoRA^2, 2024).

    All ranks share A (k, I) and bb (O, k). Each rank has its own row of B (R, k) and its own column of aa (k, R). The
    update's rank is at most min(k, R). E starts at zero, so a fresh adapter leaves the base model's output exactly as
    it is.

    Differs from the reference: it forms the dense (I, O) product in every forward pass, while here four thin products
    are evaluated from right to left; k can be chosen (8 there); the multiplier is alpha / r, without the 1e-5 added to
    r; nothing is merged on eval(), where the reference multiplies elementwise.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        inner_width: int,
        scaling: float,
        *,
        dropout: float = 0.0,
        init_std: float = 0.02,
        generator: torch.Generator | None = None,
        penalty: OrthogonalityPenalty | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(base, rank, scaling, dropout)
        self.inner_width = inner_width

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.randn(shape, generator=generator) * init_std).to(device, dtype))

        self.lora_A = normal(inner_width, base.in_features)
        self.lora_B = normal(rank, inner_width)
        self.lora_E = nn.Parameter(torch.zeros(rank, dtype=dtype, device=device))
        self.lora_aa = normal(inner_width, rank)
        self.lora_bb = normal(base.out_features, inner_width)
        self._penalty = [penalty] if penalty is not None else []  # in a list: not a submodule
        self.merged_kI: Tensor | None = None
        """aa diag(E * mask * scaling) B A for this forward pass, set by the bank; None: ``forward`` evaluates four
        products."""

    def factor_shapes(self) -> dict[str, tuple[tuple[int, ...], int | None]]:
        k, rank = self.inner_width, self.rank
        return {
            "A": ((k, self.in_features), None),
            "B": ((rank, k), 0),
            "E": ((rank,), 0),
            "aa": ((k, rank), 1),
            "bb": ((self.out_features, k), None),
        }

    def forward(self, x_BI: Tensor) -> Tensor:
        if self.merged_kI is not None:
            return with_gain(self, x_BI, self.merged_kI, None, self.lora_bb)
        factors: TwoScaleFactors = (self.lora_A, self.lora_B, self.lora_aa, self.lora_bb)
        if self._penalty and self.training:
            mask_R = self.rank_mask_R if self.gated else None
            factors = self._penalty[0].attach_two_scale(factors, mask_R, self.penalty_slot)
        A_kI, B_Rk, aa_kR, bb_Ok = factors
        E_R = self.lora_E * self.rank_mask_R if self.gated else self.lora_E
        inner_Bk = F.linear(self.dropout(x_BI).to(A_kI.dtype), A_kI)
        ranks_BR = F.linear(inner_Bk, B_Rk) * (E_R * self.scaling)
        update_BO = F.linear(F.linear(ranks_BR, aa_kR), bb_Ok)
        base_BO: Tensor = self.base(x_BI)
        return base_BO + update_BO.to(base_BO.dtype)


def two_scale_pair(A_kI: Tensor, B_Rk: Tensor, aa_kR: Tensor, bb_Ok: Tensor) -> tuple[Tensor, Tensor]:
    """The inner products B A (R, I) and bb aa (O, R), fp32. With E between them, any export can fold them."""
    return B_Rk.detach().float() @ A_kI.detach().float(), bb_Ok.detach().float() @ aa_kR.detach().float()
