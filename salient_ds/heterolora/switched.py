"""HeteroLoRA's adapter around one frozen linear layer: a whole module that is on or off.

Shape legend: I = in features, R = rank, x_BI: any leading axes, then I.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from salient_ds.adapters.ranked_linear import PlainLinear, with_gain


class SwitchedLinear(PlainLinear):
    """y = a (W0 x + b + scaling * B (m A) dropout(x)); m is 1 for a row that is on and 0 for one that is off.

    HeteroLoRA (Zhang et al. 2024, arXiv 2406.14956) turns whole modules on and off: all rows of a module share one m.
    A module that is off stays in the graph: its gradients are exact zeros instead of missing, and the order in which
    ZeRO-3 fetches parameters is the same for every mask. Differs from the reference, which skips the branch.
    """

    drops_masked: ClassVar[bool] = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.importance = 1.0
        """a: a factor on the whole output, including the frozen layer's. Only the ALPHA-TEST sets it."""

    def forward(self, x_BI: Tensor) -> Tensor:
        if self.gain_R is not None:  # mask and scaling in one, from a bank
            together_BO = with_gain(self, x_BI, self.lora_A, self.gain_R, self.lora_B)
            return together_BO if self.importance == 1.0 else together_BO * self.importance
        A_RI = self.lora_A * self.rank_mask_R.unsqueeze(1)
        inner_BR = F.linear(self.dropout(x_BI).to(A_RI.dtype), A_RI) * self.scaling
        base_BO: Tensor = self.base(x_BI)
        output_BO = base_BO + F.linear(inner_BR, self.lora_B).to(base_BO.dtype)
        return output_BO if self.importance == 1.0 else output_BO * self.importance
