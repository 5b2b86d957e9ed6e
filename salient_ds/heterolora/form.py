"""The adapter form that HeteroLoRA uses for linear layers. Importing this loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from salient_ds.adapters.forms import PlainForm, Wrapping

if TYPE_CHECKING:
    from torch import nn

    from salient_ds.adapters.ranked_linear import RankedLinear


@dataclass(frozen=True)
class SwitchedForm(PlainForm):
    """B (m A): a mask m switches all rows of a module on or off together."""

    def wrap(self, base: nn.Linear, wrapping: Wrapping) -> RankedLinear:
        from salient_ds.heterolora.switched import SwitchedLinear

        w = wrapping
        scaling = self.scaling(w.alpha, w.rank)
        return SwitchedLinear(
            base, w.rank, scaling, dropout=w.dropout, generator=w.generator, dtype=w.dtype, device=w.device
        )
