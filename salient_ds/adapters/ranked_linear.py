"""Adapters around one frozen linear layer.

Shape legend: I = in features, O = out features, R = initial rank, x_BI = any leading axes, then I.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salient_ds.adapters.low_rank import low_rank_linear
from salient_ds.adapters.orthogonality import OrthogonalityPenalty


@dataclass(frozen=True)
class FactorAddress:
    """Where one factor is stored: elements [offset, offset + prod(shape)) of a flat view of ``parameter``."""

    parameter: nn.Parameter
    offset: int
    shape: tuple[int, ...]
    rank_axis: int | None


class RankedLinear(nn.Module, ABC):
    """A frozen ``nn.Linear`` plus a trainable low-rank update whose rows can be switched off.

    ``rank_mask_R`` is a bool buffer, so no engine casts it to the training precision. It is not saved with the model;
    the checkpoint stores the decision instead.
    """

    drops_masked: ClassVar[bool] = False
    """Whether masked rows have no effect even while they may still come back, so that an export leaves them out."""
    takes_gain: ClassVar[bool] = False
    """Whether ``forward`` uses ``gain_R`` where a bank sets it: mask, scaling and singular values in one factor."""
    rank_mask_R: Tensor

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float) -> None:
        super().__init__()
        for parameter in base.parameters():
            parameter.requires_grad_(False)
        self.base = base
        self.rank = rank
        self.scaling = scaling
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        self.gated = False
        self.packed: dict[str, tuple[nn.Parameter, int]] = {}
        """If a :class:`FactorBank` holds the factors: flat parameter and first element of each, by short name."""
        self.fused = True
        """Use one autograd function for layer and update where possible. It adds in place. That does not work with
        selective checkpointing, which keeps the very results that are added to."""
        self.penalty_slot = 0
        """Index of the adapter in the orthogonality penalty and in scores of whole matrices."""
        self.mask_version = 0
        """Increases with every change of scaling, and of the mask where it is used, so that values derived from them
        can be updated."""
        self._seen_R: Tensor | None = None
        """The mask on the CPU, as it was set last; None: not known."""
        self.register_buffer("rank_mask_R", torch.ones(rank, dtype=torch.bool), persistent=False)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    @property
    def weight(self) -> Tensor:
        """The frozen weight. Some model code reads ``module.weight.dtype`` (T5)."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def set_mask(self, mask_R: Tensor, gate: bool, final: bool = True) -> None:
        """Set which rows are live.

        Args:
            mask_R: bool, any device; False switches a row off.
            gate: also mask the rows in the forward pass, so that rows switched off get no gradient.
            final: rows switched off will not come back. Only growing forms use this.
        """
        on_host = mask_R.clone() if mask_R.device.type == "cpu" else None
        same = on_host is not None and self._seen_R is not None and torch.equal(on_host, self._seen_R)
        if same and gate == self.gated:
            return  # an event that changes nothing costs nothing: what depends on the mask stays as it is
        if not same:
            self.rank_mask_R.copy_(mask_R)
            self._seen_R = on_host
        if gate or self.gated:  # else neither forward pass nor penalty looks at the mask
            self.mask_version += 1
        self.gated = gate

    def gain(self) -> tuple[Tensor, Tensor | None]:
        """What a bank multiplies singular values with (R,), and what it adds to the products (R,; None: nothing)."""
        live_R = self.rank_mask_R if self.gated else torch.ones_like(self.rank_mask_R)
        return live_R.float() * self.scaling, None

    def penalised(self) -> Tensor:
        """Rows that count in the orthogonality penalty (R,), bool."""
        return self.rank_mask_R if self.gated else torch.ones_like(self.rank_mask_R)

    @abstractmethod
    def factor_shapes(self) -> dict[str, tuple[tuple[int, ...], int | None]]:
        """Shape and rank axis (None: shared by all ranks) of each trainable factor by short name ("A", "E", "B")."""

    def factors(self) -> dict[str, FactorAddress]:
        """Addresses of the trainable factors by short name."""
        found = {}
        for name, (shape, rank_axis) in self.factor_shapes().items():
            parameter, offset = self.packed.get(name) or (getattr(self, f"lora_{name}"), 0)
            found[name] = FactorAddress(parameter, offset, shape, rank_axis)
        return found

    def resize(self, rank: int) -> None:
        """Change to ``rank`` rows, all live. The bank that holds the factors has to create new ones of that size."""
        assert self.packed, "only packed factors can be replaced"
        self.rank = rank
        self.rank_mask_R = torch.ones(rank, dtype=torch.bool, device=self.rank_mask_R.device)
        self._seen_R = None
        self.mask_version += 1

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling:g}"


class SVDLinear(RankedLinear):
    """y = W0 x + b + scaling * B diag(E * mask) A dropout(x)  (AdaLoRA Eq. 3; SalientLoRA section 3).

    E starts at zero, so a fresh adapter leaves the base model's output exactly as it is. The update is evaluated from
    right to left as two thin products; the dense update is never formed. Differs from the reference: the multiplier is
    alpha / r, without the 1e-5 that its code adds to r.
    """

    takes_gain: ClassVar[bool] = True

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
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
        shape_A, shape_B = (rank, base.in_features), (base.out_features, rank)
        self.lora_A = nn.Parameter(_normal(shape_A, init_std, generator).to(device, dtype))
        self.lora_E = nn.Parameter(torch.zeros(rank, dtype=dtype, device=device))
        self.lora_B = nn.Parameter(_normal(shape_B, init_std, generator).to(device, dtype))
        self._penalty = [penalty] if penalty is not None else []  # in a list: not a submodule
        self.gain_R: Tensor | None = None
        """E * mask * scaling for this forward pass, set by the bank; None: ``forward`` computes it."""

    def factor_shapes(self) -> dict[str, tuple[tuple[int, ...], int | None]]:
        rank = self.rank
        return {"A": ((rank, self.in_features), 0), "E": ((rank,), 0), "B": ((self.out_features, rank), 1)}

    def forward(self, x_BI: Tensor) -> Tensor:
        if self.gain_R is not None:
            return with_gain(self, x_BI, self.lora_A, self.gain_R, self.lora_B)
        A_RI: Tensor = self.lora_A
        B_OR: Tensor = self.lora_B
        E_R: Tensor = self.lora_E
        if self._penalty and self.training:
            mask_R = self.rank_mask_R if self.gated else None
            A_RI = self._penalty[0].attach(A_RI, mask_R, 0, (self.penalty_slot, 0))
            B_OR = self._penalty[0].attach(B_OR, mask_R, 1, (self.penalty_slot, 1))
        if self.gated:
            E_R = E_R * self.rank_mask_R
        inner_BR = F.linear(self.dropout(x_BI).to(A_RI.dtype), A_RI)
        update_BO = F.linear(inner_BR * (E_R * self.scaling), B_OR)
        base_BO: Tensor = self.base(x_BI)
        return base_BO + update_BO.to(base_BO.dtype)


class PlainLinear(RankedLinear):
    """y = W0 x + b + scaling * B A dropout(x), with B = 0 at the start (LoRA, Hu et al. 2022)."""

    takes_gain: ClassVar[bool] = True

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        scaling: float,
        *,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(base, rank, scaling, dropout)
        self.lora_A = nn.Parameter(uniform_start(rank, base.in_features, generator).to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=device))
        self.gain_R: Tensor | None = None
        """mask * scaling, set by the bank; None: ``forward`` applies the scaling alone."""

    def factor_shapes(self) -> dict[str, tuple[tuple[int, ...], int | None]]:
        return {"A": ((self.rank, self.in_features), 0), "B": ((self.out_features, self.rank), 1)}

    def forward(self, x_BI: Tensor) -> Tensor:
        if self.gain_R is not None:
            return with_gain(self, x_BI, self.lora_A, self.gain_R, self.lora_B)
        inner_BR = F.linear(self.dropout(x_BI).to(self.lora_A.dtype), self.lora_A) * self.scaling
        base_BO: Tensor = self.base(x_BI)
        return base_BO + F.linear(inner_BR, self.lora_B).to(base_BO.dtype)


def with_gain(adapter: RankedLinear, x_BI: Tensor, A_RI: Tensor, gain_R: Tensor | None, B_OR: Tensor) -> Tensor:
    """base(x) + B diag(gain) A dropout(x), in one autograd function where possible. No gain: 1."""
    if len(A_RI) == 0:  # read off the tensor: torch.compile would specialise on every value of `rank`
        base_BO: Tensor = adapter.base(x_BI)
        return base_BO
    plain = isinstance(adapter.dropout, nn.Identity) or not adapter.training
    if (
        plain
        and adapter.fused
        and x_BI.dtype == A_RI.dtype == adapter.base.weight.dtype
        and not torch.compiler.is_compiling()
    ):
        return low_rank_linear(x_BI, adapter.base.weight, adapter.base.bias, A_RI, gain_R, B_OR)
    inner_BR = F.linear(adapter.dropout(x_BI).to(A_RI.dtype), A_RI)
    base_BO = adapter.base(x_BI)
    inner_BR = inner_BR if gain_R is None else inner_BR * gain_R
    return base_BO + F.linear(inner_BR, B_OR).to(base_BO.dtype)


def uniform_start(rank: int, in_features: int, generator: torch.Generator | None) -> Tensor:
    """Initial A (R, I) as in LoRA's released code: kaiming_uniform with a = sqrt(5), fp32 on the CPU."""
    bound = 1 / math.sqrt(in_features)
    return torch.rand(rank, in_features, generator=generator) * 2 * bound - bound


def _normal(shape: tuple[int, ...], std: float, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator) * std
