"""LoRA (Hu et al. 2022): every rank stays. The baseline that adaptive methods are measured against."""

from __future__ import annotations

from salient_ds.methods.base import BaseMethod
from salient_ds.ranks import MaskPolicy


class LoRA(BaseMethod):
    """No statistic, no event."""

    policy = MaskPolicy(gate_forward=False, zero_vectors=False, zero_moments=False)
