"""The factors of all two-scale adapters of a bank as a few stacks, and the penalty's gradient for all of them at once.

Shape legend: N = adapters of the bank, n = those of one block, R = rank, k = inner width, I/O = in/out features.
The numbers are those of :mod:`salient_ds.adapters.orthogonality`, adapter by adapter: some fifty kernels for a bank of
four LLaMA layers, instead of sixty for every one of its 28 adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from salient_ds.adapters.orthogonality import TINY, OrthogonalityPenalty
from salient_ds.adapters.slots import Slot
from salient_ds.adapters.two_scale import TwoScaleLinear


@dataclass
class Block:
    """Neighbouring factors of one kind and shape in the flat parameter."""

    members: list[int]
    """Their adapters, by position in the bank."""
    offset: int
    shape: tuple[int, int]

    def view(self, flat: Tensor) -> Tensor:
        """(n, *shape), a view."""
        numel = len(self.members) * math.prod(self.shape)
        return flat[self.offset : self.offset + numel].view(len(self.members), *self.shape)


def blocks_of(factor: str, slots: Sequence[Slot], adapters: Sequence[TwoScaleLinear]) -> list[Block]:
    """All factors of one kind, neighbours of the same shape together."""
    position = {id(adapter): index for index, adapter in enumerate(adapters)}
    found: list[Block] = []
    for slot in (slot for slot in slots if slot.factor == factor):
        shape = (slot.shape[0], slot.shape[1])
        last = found[-1] if found else None
        if last and last.shape == shape and last.offset + len(last.members) * math.prod(shape) == slot.offset:
            last.members.append(position[id(slot.adapter)])
        else:
            found.append(Block([position[id(slot.adapter)]], slot.offset, shape))
    return found


class TwoScaleStack:
    """All factors of a bank whose adapters have one rank and one inner width.

    Args:
        slots: where the bank's flat parameter holds A (k, I), B (R, k), aa (k, R) and bb (O, k).
    """

    def __init__(self, adapters: Sequence[TwoScaleLinear], slots: Sequence[Slot]) -> None:
        self.adapters = list(adapters)
        self.blocks = {factor: blocks_of(factor, slots, adapters) for factor in ("A", "B", "aa", "bb")}
        for factor in ("B", "aa"):  # joined over blocks, these are in the order of the adapters
            assert [m for block in self.blocks[factor] for m in block.members] == list(range(len(adapters)))
        self.numel = sum(slot.numel for slot in slots)
        self.slots_N = torch.zeros(0, dtype=torch.int64)
        self.live_NR: Tensor | None = None
        """Rows that count in the penalty; None: all."""
        self._index: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] | None = None

    def keep_addresses(self, like: Tensor) -> None:
        """Store A' of every block in the same memory in every forward pass, in the type of ``like``."""
        self._kept = {id(block): like.new_empty(len(block.members), *block.shape) for block in self.blocks["A"]}

    def stored(self, block: Block, merged_nkI: Tensor, dtype: torch.dtype) -> Tensor:
        """A' of a block of "A" in ``dtype``, at a fixed address after :meth:`keep_addresses`."""
        return merged_nkI.to(dtype) if self._kept is None else self._kept[id(block)].copy_(merged_nkI)

    def refresh(self, device: torch.device) -> None:
        """Update everything that depends on the adapters' masks."""
        self.slots_N = torch.tensor([a.penalty_slot for a in self.adapters], device=device)
        live_NR = torch.stack([a.penalised().to(device) for a in self.adapters])
        self.live_NR = None if bool(live_NR.all()) else live_NR
        self._index = {
            id(block): torch.tensor(block.members, device=device) for part in self.blocks.values() for block in part
        }

    def joined(self, factor: str, flat: Tensor) -> Tensor:
        """B (N, R, k) or aa (N, k, R) of all adapters, fp32."""
        pieces = [block.view(flat) for block in self.blocks[factor]]
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).float()

    def pick(self, tensor: Tensor, block: Block) -> Tensor:
        """The rows of a tensor (N, ...) that belong to a block's adapters."""
        return tensor.index_select(0, self._index[id(block)])

    def scatter(self, pieces: Sequence[tuple[Block, Tensor]], like: Tensor) -> Tensor:
        """(N, ...) out of a tensor (n, ...) for every block."""
        out = like.new_empty(len(self.adapters), *pieces[0][1].shape[1:])
        for block, piece in pieces:
            out.index_copy_(0, self._index[id(block)], piece)
        return out

    def write(self, factor: str, value: Tensor, grad: Tensor, accumulate: bool) -> None:
        """Write (N, ...) for B or aa into the flat gradient."""
        for block, piece in zip(self.blocks[factor], value.split(self._sizes(factor)), strict=True):
            _put(block.view(grad), piece, accumulate)

    def _sizes(self, factor: str) -> list[int]:
        return [len(block.members) for block in self.blocks[factor]]

    def add_gradient(self, penalty: OrthogonalityPenalty, flat: Tensor, grad: Tensor, accumulate: bool = True) -> None:
        """Add the gradient of every adapter's penalty to ``grad`` in place, and record the norms.

        Args:
            accumulate: add to the values in ``grad``; otherwise overwrite them.
        """
        B_NRk, aa_NkR = self.joined("B", flat), self.joined("aa", flat)
        live_NR = self.live_NR
        if live_NR is not None:
            B_NRk, aa_NkR = B_NRk * live_NR.unsqueeze(2), aa_NkR * live_NR.unsqueeze(1)
        k, rank = aa_NkR.shape[1:]
        narrow = rank < k
        eye_kk = torch.eye(k, device=flat.device)
        A_Nkk = self.scatter([(b, _gram(b.view(flat))) for b in self.blocks["A"]], B_NRk)
        bb_Nkk = self.scatter([(b, _gram(b.view(flat).transpose(1, 2))) for b in self.blocks["bb"]], B_NRk)
        inner_Nkk = aa_NkR @ B_NRk
        pushed_Nkk = bb_Nkk @ inner_Nkk @ A_Nkk
        own_B, own_aa = (self._own(t, narrow) for t in (B_NRk, aa_NkR.transpose(1, 2)))
        left_A, right_bb = A_Nkk - eye_kk, bb_Nkk - eye_kk
        own = [torch.linalg.vector_norm(residual, dim=(1, 2)) for residual in (left_A, own_B, own_aa, right_bb)]
        norms = [*own, (inner_Nkk * pushed_Nkk).sum((1, 2)).clamp_min(0).sqrt()]
        for term, norm_N in enumerate(norms):
            penalty.note(self.slots_N, term, norm_N)
        if penalty.coefficient == 0:
            return
        weights = [penalty.gradient_factor(norm_N).view(-1, 1, 1) for norm_N in norms]
        # a cross norm of 0 may come from rounding; own terms are quadratic in their factor, the cross term is linear
        cross = weights[4] * (norms[4] > TINY).view(-1, 1, 1) / 2
        inner_kN = inner_Nkk.transpose(1, 2)
        left_A = weights[0] * left_A + cross * (inner_kN @ bb_Nkk @ inner_Nkk)
        right_bb = weights[3] * right_bb + cross * (inner_Nkk @ A_Nkk @ inner_kN)
        extra_B = weights[1] * (own_B @ B_NRk if narrow else B_NRk @ own_B) + cross * (aa_NkR.mT @ pushed_Nkk)
        extra_aa = weights[2] * (aa_NkR @ own_aa if narrow else own_aa @ aa_NkR) + cross * (pushed_Nkk @ B_NRk.mT)
        if live_NR is not None:
            extra_B, extra_aa = extra_B * live_NR.unsqueeze(2), extra_aa * live_NR.unsqueeze(1)
        self.write("B", extra_B, grad, accumulate)
        self.write("aa", extra_aa, grad, accumulate)
        for block, own_n in self._of("A", left_A, flat.dtype):
            block.view(grad).baddbmm_(own_n, block.view(flat), beta=int(accumulate))
        for block, own_n in self._of("bb", right_bb, flat.dtype):
            block.view(grad).baddbmm_(block.view(flat), own_n, beta=int(accumulate))

    def _of(self, factor: str, value: Tensor, dtype: torch.dtype) -> Iterator[tuple[Block, Tensor]]:
        value = value.to(dtype)
        yield from ((block, self.pick(value, block)) for block in self.blocks[factor])

    def _own(self, tall_NRk: Tensor, narrow: bool) -> Tensor:
        """B B^T - I (N, R, R) with dead rows taken out if R < k, else B^T B - I (N, k, k)."""
        product = tall_NRk @ tall_NRk.mT if narrow else tall_NRk.mT @ tall_NRk
        product = product - torch.eye(product.shape[1], device=product.device)
        if narrow and self.live_NR is not None:
            product = product * (self.live_NR.unsqueeze(1) & self.live_NR.unsqueeze(2))
        return product


def _gram(wide_nkI: Tensor) -> Tensor:
    """W W^T in fp32, (n, k, k)."""
    if wide_nkI.is_cuda and wide_nkI.dtype != torch.float32:
        # bf16 operands, fp32 accumulation and result: products of two bf16 numbers are exact in fp32
        return torch.bmm(wide_nkI, wide_nkI.mT, out_dtype=torch.float32)
    wide = wide_nkI.float()
    return torch.bmm(wide, wide.mT)


def _put(target: Tensor, value: Tensor, accumulate: bool) -> None:
    if accumulate:
        target.add_(value)
    else:
        target.copy_(value)
