"""IncreLoRA's adapter around one frozen linear layer. Its rows are active, in reserve, or off.

Shape legend: I = in features, O = out features, R = allocated rows, x_BI: any leading axes, then I.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salient_ds.adapters.module_score import ModuleScores
from salient_ds.adapters.orthogonality import OrthogonalityPenalty
from salient_ds.adapters.ranked_linear import SVDLinear, with_gain

RESERVE_SIGMA = 1e-5
"""Singular value of a reserve row: large enough for its vectors to learn, too small to noticeably change the output."""


class GrowingLinear(SVDLinear):
    """y = W0 x + b + alpha / r * B diag(E) A dropout(x), with r of the R allocated rows active and r growing.

    A parameter cannot join a ZeRO optimizer during training, so more rows are allocated than are active. Either all
    rows that the matrix may ever use are allocated from the start, or only some of them; then more are allocated
    between two steps (engine/resize.py). Each row is in one of three states:

    active: the first r rows, as in :class:`SVDLinear`.
    reserve: the next rows, while growth continues. Their singular value is the constant 1e-5. So their vectors train
        before the row is activated (advance learning), yet a fresh adapter hardly changes the base model's output.
    off: all others. They contribute nothing, get no gradient and are not in the penalty.

    The elements of ``lora_E`` that belong to reserve rows and rows that are off are never used. Differs from the
    reference: the multiplier is alpha / r, without the 1e-5 added to r; the dense update is never formed; the reserve
    is dropped when growth ends, even if it ends above the target.
    """

    drops_masked: ClassVar[bool] = True
    reserve_mask_R: Tensor

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        start_rank: int,
        reserve: int,
        alpha: float,
        *,
        dropout: float = 0.0,
        init_std: float = 0.02,
        generator: torch.Generator | None = None,
        penalty: OrthogonalityPenalty | None = None,
        scores: ModuleScores | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        room: int | None = None,
    ) -> None:
        """
        Args:
            rank: maximum rank that the matrix may grow to.
            room: rows allocated at the start (default: all).
        """
        self._drawn_from = None if generator is None else generator.get_state()
        super().__init__(
            base,
            rank,
            alpha / start_rank,
            dropout=dropout,
            init_std=init_std,
            generator=generator,
            penalty=penalty,
            dtype=dtype,
            device=device,
        )
        self.most = rank
        self._init_std = init_std
        if room is not None and room < rank:
            self._keep_first(room)
        self.alpha = alpha
        self.reserve = reserve
        """Number of reserve rows while growth continues (0 without advance learning)."""
        self._scores = [scores] if scores is not None else []  # in a list: not a submodule
        off = torch.zeros(self.rank, dtype=torch.bool, device=device)
        self.register_buffer("reserve_mask_R", off, persistent=False)
        self.set_mask(torch.arange(self.rank) < start_rank, gate=True, final=False)

    def _keep_first(self, room: int) -> None:
        self.rank = room
        self.rank_mask_R = self.rank_mask_R[:room].clone()
        self.lora_A = nn.Parameter(self.lora_A.detach()[:room].clone())
        self.lora_E = nn.Parameter(self.lora_E.detach()[:room].clone())
        self.lora_B = nn.Parameter(self.lora_B.detach()[:, :room].clone())

    def resize(self, rank: int) -> None:
        """As :meth:`RankedLinear.resize`. The caller has to set the mask again.

        Args:
            rank: at least the number of active rows, at most :attr:`most`.
        """
        assert rank <= self.most
        super().resize(rank)
        self.reserve_mask_R = torch.zeros_like(self.rank_mask_R)

    def start_values(self) -> dict[str, Tensor]:
        """Initial values of all rows, including rows not allocated yet: full factors by short name, fp32, CPU.

        They are drawn again on every call (a second per 10^8 elements), so nothing has to be kept during the run.
        """
        assert self._drawn_from is not None, "without a generator of its own nothing can be drawn again"
        generator = torch.Generator()
        generator.set_state(self._drawn_from)
        drawn = SVDLinear(
            self.base, self.most, 1.0, init_std=self._init_std, generator=generator, dtype=self.lora_A.dtype
        )
        return {factor: getattr(drawn, f"lora_{factor}").detach().float() for factor in ("A", "E", "B")}

    def set_mask(self, mask_R: Tensor, gate: bool, final: bool = True) -> None:
        """Activate the first rows, as many as the mask has set, and update the scaling. ``final``: growth has ended."""
        super().set_mask(mask_R, gate, final)
        row_R, active = torch.arange(self.rank), int(mask_R.sum())
        assert bool(mask_R[:active].all()) and active, "rows are activated in order, and one is from the start"
        reserve = 0 if final else self.reserve
        self.reserve_mask_R.copy_((row_R >= active) & (row_R < active + reserve))
        self.scaling = self.alpha / active
        self.mask_version += 1

    def _with_bank(self, x_BI: Tensor, gain_R: Tensor) -> Tensor:
        scores = self._scores[0] if self._scores and self.training and self._scores[0].armed else None
        if scores is None:
            return with_gain(self, x_BI, self.lora_A, gain_R, self.lora_B)
        factors = self.lora_A, self.lora_B, gain_R
        if isinstance(self.dropout, nn.Identity):  # the gradient of layer and update together is that of the update
            together_BO = with_gain(self, x_BI, self.lora_A, gain_R, self.lora_B)
            return scores.watch(together_BO, x_BI.to(self.lora_A.dtype), *factors, self.penalty_slot)
        input_BI = self.dropout(x_BI).to(self.lora_A.dtype)  # drawn once, for the update and its score
        update_BO = F.linear(F.linear(input_BI, self.lora_A) * gain_R, self.lora_B)
        update_BO = scores.watch(update_BO, input_BI, *factors, self.penalty_slot)
        base_BO: Tensor = self.base(x_BI)
        return base_BO + update_BO.to(base_BO.dtype)

    def sigma(self) -> Tensor:
        """Effective singular values (R,); only those of active rows are trained."""
        E_R: Tensor = self.lora_E
        return torch.where(self.rank_mask_R, E_R, (self.reserve_mask_R * RESERVE_SIGMA).to(E_R.dtype))

    def gain(self) -> tuple[Tensor, Tensor]:
        """As :meth:`sigma` times scaling: active rows have their own value, reserve rows a constant."""
        return self.rank_mask_R * self.scaling, self.reserve_mask_R * (RESERVE_SIGMA * self.scaling)

    def penalised(self) -> Tensor:
        """Active rows and the reserve."""
        return self.rank_mask_R | self.reserve_mask_R

    def forward(self, x_BI: Tensor) -> Tensor:
        if self.gain_R is not None:  # from a bank, whose backward pass adds the penalty
            return self._with_bank(x_BI, self.gain_R)
        A_RI: Tensor = self.lora_A
        B_OR: Tensor = self.lora_B
        if self._penalty and self.training:
            mask_R = self.rank_mask_R | self.reserve_mask_R
            A_RI = self._penalty[0].attach(A_RI, mask_R, 0, (self.penalty_slot, 0))
            B_OR = self._penalty[0].attach(B_OR, mask_R, 1, (self.penalty_slot, 1))
        gain_R = self.sigma() * self.scaling
        input_BI = self.dropout(x_BI).to(A_RI.dtype)
        update_BO = F.linear(F.linear(input_BI, A_RI) * gain_R, B_OR)
        if self._scores and self.training:
            leaves = self.lora_A, self.lora_B
            update_BO = self._scores[0].watch(update_BO, input_BI, *leaves, gain_R, self.penalty_slot)
        base_BO: Tensor = self.base(x_BI)
        return base_BO + update_BO.to(base_BO.dtype)
