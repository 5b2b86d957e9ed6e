"""How much of an adapter's update the data type of a merged model loses.

A merged weight is W0 + B A, rounded to the stored type. Where the update is small beside W0, most of it may vanish: the
spacing of bfloat16 numbers is 1/128 to 1/256 of their size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from salient_ds.export.fold import LoraPair

LARGEST_SHARE = 0.01
"""Above this share of the update, the error is worth a warning."""
_ROWS = 2048
"""Rows that are added at a time, to keep fp64 copies small."""


@dataclass
class RoundingError:
    """Squared Frobenius norms of rounding errors and of updates, summed over matrices."""

    error: float = 0.0
    update: float = 0.0
    shares: dict[str, float] = field(default_factory=dict)
    """Per matrix: norm of the error / norm of the update."""

    @property
    def share(self) -> float:
        """Norm of the error / norm of the update, over all matrices."""
        return math.sqrt(self.error / self.update) if self.update else 0.0

    def add(self, name: str, error: float, update: float) -> None:
        """Count one matrix, given both squared norms."""
        self.error += error
        self.update += update
        self.shares[name] = math.sqrt(error / update) if update else 0.0

    def line(self, dtype: str) -> str:
        """What to tell the user, in one line. ``dtype``: of the stored matrices, in words."""
        worst = max(self.shares, key=lambda name: self.shares[name])
        text = (
            f"rounding the merged weights to {dtype} changes the adapter's update by {_percent(self.share)} (Frobenius "
            f"norm over {len(self.shares)} matrices, largest in {worst}: {_percent(self.shares[worst])})"
        )
        warning = f"; this is above {LARGEST_SHARE:.0%} of the update: --dtype float32 keeps it"
        return text + (warning if self.share > LARGEST_SHARE else "")


def merge_matrix(base_OI: Tensor, pair: LoraPair, dtype: torch.dtype, rounding: RoundingError) -> Tensor:
    """W0 + B A, (O, I), added in fp64 and rounded once to ``dtype``. The error is added to ``rounding``."""
    out_OI = torch.empty(base_OI.shape, dtype=dtype)
    error = update = 0.0
    for first in range(0, base_OI.shape[0], _ROWS):
        rows = slice(first, first + _ROWS)
        delta = (pair.B_Or[rows] @ pair.A_rI).double()
        exact = base_OI[rows].double() + delta
        out_OI[rows] = exact.to(dtype)
        error += float((out_OI[rows].double() - exact).square().sum())
        update += float(delta.square().sum())
    rounding.add(pair.name, error, update)
    return out_OI


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share >= 0.0001 else "less than 0.01 %"
