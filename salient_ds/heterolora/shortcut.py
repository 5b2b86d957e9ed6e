"""HeteroLoRA's shortcut modules: low-rank updates of connections that have no weight of their own.

Shape legend: D = hidden size, R = rank, x_BD: any leading axes, then D.
"""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salient_ds.adapters.ranked_linear import RankedLinear, uniform_start

ShortcutKind = Literal["residual_1", "residual_2", "shortcut_sa", "shortcut_ffn"]
KINDS: tuple[ShortcutKind, ...] = ("residual_1", "residual_2", "shortcut_sa", "shortcut_ffn")
"""In the reference's order of candidates."""
FROM_IDENTITY = ("residual_1", "residual_2")
"""Kinds that sit on an existing connection and pass x on. The other kinds add a connection."""
NormAfterShortcut = Literal["none", "reuse"]


class _NoLayer(nn.Module):
    """Takes the place of the frozen layer that other adapters have: it has sizes, but no weight."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.in_features = self.out_features = hidden_size


class Shortcut(RankedLinear):
    """y = base(x) + beta scaling * B (m A) dropout(x), with base(x) = x on a residual path and 0 on a new connection.

    HeteroLoRA (Zhang et al. 2024, arXiv 2406.14956), figure 1. m is 1 for a row that is on and 0 for one that is off,
    as in :class:`~salient_ds.heterolora.switched.SwitchedLinear`. B is zero at the start. Differs from the reference,
    which multiplies by a stored dense D x D identity or zero matrix.
    """

    drops_masked: ClassVar[bool] = True

    def __init__(
        self,
        kind: ShortcutKind,
        hidden_size: int,
        rank: int,
        scaling: float,
        *,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(cast(nn.Linear, _NoLayer(hidden_size)), rank, scaling, dropout)
        self.kind = kind
        self.importance = 1.0
        """beta: a factor on the low-rank part. Only the ALPHA-TEST sets it."""
        self.lora_A = nn.Parameter(uniform_start(rank, hidden_size, generator).to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(hidden_size, rank, dtype=dtype, device=device))

    def factor_shapes(self) -> dict[str, tuple[tuple[int, ...], int | None]]:
        return {"A": ((self.rank, self.in_features), 0), "B": ((self.out_features, self.rank), 1)}

    def forward(self, x_BD: Tensor) -> Tensor:
        A_RD = self.lora_A * self.rank_mask_R.unsqueeze(1)
        inner_BR = F.linear(self.dropout(x_BD).to(A_RD.dtype), A_RD) * (self.scaling * self.importance)
        update_BD = F.linear(inner_BR, self.lora_B).to(x_BD.dtype)
        return x_BD + update_BD if self.kind in FROM_IDENTITY else update_BD

    def extra_repr(self) -> str:
        return f"{self.kind}, hidden_size={self.in_features}, {super().extra_repr()}"
