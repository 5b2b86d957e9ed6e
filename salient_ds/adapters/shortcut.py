"""HeteroLoRA's shortcut modules: low-rank updates of connections that have no weight of their own.

Shape legend: D = hidden size, R = rank, x_BD: any leading axes, then D.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salient_ds.adapters.ranked_linear import RankedLinear, uniform_start

ShortcutKind = Literal["residual_1", "residual_2", "shortcut_sa", "shortcut_ffn"]
KINDS: tuple[ShortcutKind, ...] = ("residual_1", "residual_2", "shortcut_sa", "shortcut_ffn")
"""In the reference's order of candidates."""
FROM_IDENTITY = ("residual_1", "residual_2")
"""Kinds that sit on a connection that is there anyway: x is passed on. The others add a connection."""
NormAfterShortcut = Literal["none", "reuse"]


@dataclass(frozen=True)
class ShortcutOptions:
    """Which shortcuts a model gets, and how they act."""

    rank: int
    modules: tuple[str, ...] = KINDS
    """Kinds, or paths such as "model.layers.3.residual_1" (matched like ``adapter.target_modules``)."""
    alpha: float = 4.0
    """Scaling numerator: the update is (alpha / rank) B A x."""
    dropout: float = 0.0
    norm_after_shortcut: NormAfterShortcut = "none"
    """reuse: normalise once more after each shortcut joins, as the reference; that changes the pretrained function."""


def is_shortcut(name: str) -> bool:
    """Whether a module path is that of a shortcut (by its last part)."""
    return name.rpartition(".")[2] in KINDS


def choose_shortcuts(names: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Those of ``names`` that ``wanted`` (kinds or paths) means, in the order of ``names``.

    Raises:
        ValueError: one of ``wanted`` matches nothing.
    """

    def matches(name: str, item: str) -> bool:
        return name == item or name.endswith(f".{item}")

    for item in wanted:
        if not any(matches(name, item) for name in names):
            near = difflib.get_close_matches(item, [*KINDS, *names], n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            first = "; the first layer has no shortcut_ffn" if item.endswith("shortcut_ffn") else ""
            raise ValueError(
                f"adapter.shortcuts.modules: {item!r} is no shortcut of this model{hint} (kinds: {', '.join(KINDS)}; "
                f"first path: {names[0]}{first})"
            )
    return [name for name in names if any(matches(name, item) for item in wanted)]


class _NoLayer(nn.Module):
    """Stands where other adapters have their frozen layer: the sizes, and no weight."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.in_features = self.out_features = hidden_size


class Shortcut(RankedLinear):
    """y = base(x) + beta scaling * B (m A) dropout(x), with base(x) = x on a residual path and 0 on a new connection.

    HeteroLoRA (Zhang et al. 2024, arXiv 2406.14956), figure 1. m is 1 for a row that is on and 0 for one that is off,
    as in :class:`salient_ds.adapters.switched.SwitchedLinear`. B is zero at the start. Differs from the reference: that
    multiplies by a stored dense D x D identity or zero matrix.
    """

    def __init__(
        self,
        kind: ShortcutKind,
        hidden_size: int,
        rank: int,
        scaling: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(cast(nn.Linear, _NoLayer(hidden_size)), rank, scaling, dropout)
        self.kind = kind
        self.importance = 1.0
        """beta, set by the ALPHA-TEST only: it scales the low-rank part."""
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
