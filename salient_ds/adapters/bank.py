"""Banks: the factors of a few decoder layers' adapters, packed into two flat parameters.

The optimizer and hooks then handle a few large tensors instead of many small ones. In a bank, an adapter's ``lora_A``,
``lora_B``, ... are views of the flat parameters instead of parameters. A forward pass creates new views when it reaches
the first of the bank's layers. Statistics, masks, checkpoints and export use addresses (:meth:`RankedLinear.factors`),
so they work the same whether or not factors are packed.

Shape legend: n = adapters in one stack, R = rank, I/O = in/out features, L = singular values of the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from salient_ds.adapters.orthogonality import OrthogonalityPenalty
from salient_ds.adapters.penalty_graph import PenaltyGraph
from salient_ds.adapters.ranked_linear import PlainLinear, RankedLinear, SVDLinear
from salient_ds.adapters.slots import Slot, join, lay_out, stackable
from salient_ds.adapters.stacked_penalty import Stack
from salient_ds.adapters.two_scale import TwoScaleLinear
from salient_ds.adapters.two_scale_bank import merge, two_scale_stack
from salient_ds.adapters.two_scale_stack import TwoScaleStack


class FactorBank(nn.Module):
    """Holds the factors of several adapters in one flat parameter and their singular values in another.

    Args:
        layers: the adapters of each layer. Their factors are parameters, or lie in a bank that this one replaces.
        copy: copy the current values. Otherwise the new parameters are zero.
    """

    def __init__(self, layers: Sequence[Sequence[RankedLinear]], copy: bool = True) -> None:
        super().__init__()
        self.layers = [list(members) for members in layers]
        self._adapters = [adapter for members in layers for adapter in members]
        self._fused = all(adapter.takes_gain for adapter in self._adapters)
        self.substitute: Callable[[Tensor], Tensor] | None = None
        """What a forward pass uses in place of the parameters, by plain operations of torch alone (SYNFLOW); None:
        themselves."""
        self._slots = lay_out(self._adapters, sigmas=False)
        self._sigma_slots = lay_out(self._adapters, sigmas=True)
        first = self._adapters[0].factors()["A"].parameter
        self.factors = self._fill(self._slots, first, copy)
        if self._sigma_slots:
            self.sigmas = self._fill(self._sigma_slots, first, copy)
        for parameter, slots in self._parameters_with_slots():
            for slot in slots:
                name = f"lora_{slot.factor}"
                slot.adapter._parameters.pop(name, None)
                slot.adapter.packed[slot.factor] = (parameter, slot.offset)
                setattr(slot.adapter, name, self._views(parameter, [slot])[0].detach())
        for adapter in self._adapters:
            _drop_derived(adapter)  # those of the last forward pass belong to another bank's graph
        self._two_scale = two_scale_stack(self._adapters, self._slots)
        self._stacks: list[Stack | TwoScaleStack] = self._make_stacks() if self._fused and self._sigma_slots else []
        if self._two_scale is not None:
            self._stacks = [self._two_scale]
        self._penalty_graph = PenaltyGraph()
        self.largest = len(self.factors)
        """Number of elements in ``factors`` of the model's largest bank."""
        self._version = -1
        self._gain_L = torch.zeros(0)
        self._added_L: Tensor | None = None
        self._kept: list[Tensor] | None = None
        self._resized = not copy

    def _parameters_with_slots(self) -> list[tuple[nn.Parameter, list[Slot]]]:
        pairs = [(self.factors, self._slots)]
        return [*pairs, (self.sigmas, self._sigma_slots)] if self._sigma_slots else pairs

    def _fill(self, slots: list[Slot], like: Tensor, copy: bool) -> nn.Parameter:
        flat = torch.zeros(sum(slot.numel for slot in slots), dtype=like.dtype, device=like.device)
        for slot in slots if copy else []:
            old = slot.adapter.factors()[slot.factor]
            flat[slot.offset : slot.offset + slot.numel] = old.parameter.detach().view(-1)[
                old.offset : old.offset + slot.numel
            ]
        return nn.Parameter(flat, requires_grad=len(flat) > 0)  # a layer may have lost all its rows

    @staticmethod
    def _views(parameter: Tensor, slots: Sequence[Slot]) -> list[Tensor]:
        # one call per view instead of two; the parameter may itself be a slice of DeepSpeed's flat buffer
        start = parameter.storage_offset()
        return [parameter.as_strided(slot.shape, slot.strides, start + slot.offset) for slot in slots]

    def keep_addresses(self) -> None:
        """Write what is derived to the same memory in every forward pass. Its backward pass has to come next."""
        if self._two_scale is not None:
            self._two_scale.keep_addresses(self.factors)
        self._kept = [self.factors.new_empty(adapter.rank) for adapter in self._adapters]

    def anew(self) -> FactorBank:
        """A bank for the same adapters after they have been resized. Its parameters are zero."""
        found = FactorBank(self.layers, copy=False)
        if self._kept is not None:
            found.keep_addresses()
        return found

    def _gains(self, gain_L: Tensor) -> Sequence[Tensor]:
        """Gains in the factors' precision, one tensor for every adapter.

        Each has memory of its own. A compiler would tell slices apart by where they begin.
        """
        low_L, ranks = gain_L.to(self.factors.dtype), [adapter.rank for adapter in self._adapters]
        if self._kept is None:
            found: list[Tensor] = torch.ops.aten.split_with_sizes_copy(low_L, ranks)
            return found
        torch.split_with_sizes_copy(low_L, ranks, out=self._kept)
        return self._kept

    def _mark_ranks(self, views: Sequence[Tensor], gains: Sequence[Tensor]) -> None:
        """Tell the compiler that ranks differ from layer to layer. It would find out one matrix after the other."""
        for slot, view in zip(self._slots, views, strict=True):
            torch._dynamo.maybe_mark_dynamic(view, 0 if slot.factor == "A" else 1)
        for gain_R in gains:
            torch._dynamo.maybe_mark_dynamic(gain_R, 0)

    def _make_stacks(self) -> list[Stack | TwoScaleStack]:
        return [
            Stack(
                adapters=tuple(slot.adapter for slot in slots),
                rank_axis=0 if slots[0].factor == "A" else 1,
                offset=slots[0].offset,
                shapes=tuple((slot.shape[0], slot.shape[1]) for slot in slots),
            )
            for slots in stackable(self._slots)
        ]

    def unpack(self) -> None:
        """Give every adapter its views for this forward pass. Their gradients flow back to the flat parameters."""
        if self.substitute is not None:
            self._unpack_plainly(self.substitute)
            return
        if self._fused:
            self._refresh()
            sigmas = self.sigmas if self._sigma_slots else None
            found = _Unpack.apply(self.factors, sigmas, self)
            views, gains = found[: len(self._slots)], found[len(self._slots) :]
            if self._resized:
                self._mark_ranks(views, gains)
            for slot, view in zip(self._slots, views, strict=True):
                object.__setattr__(slot.adapter, f"lora_{slot.factor}", view)
            for adapter, gain_R in zip(self._adapters, gains, strict=True):
                object.__setattr__(adapter, "gain_R", gain_R)
            return
        if self._two_scale is not None:
            self._refresh()
            penalty = self._penalty()
            merge(
                self.factors, self.sigmas, self._gain_L, self._two_scale,
                None if penalty is None else functools.partial(self._add_penalty, penalty),
            )  # fmt: skip
            return
        self._unpack_plainly(lambda parameter: parameter)

    def _unpack_plainly(self, substitute: Callable[[Tensor], Tensor]) -> None:
        for adapter in self._adapters:
            _drop_derived(adapter)
        for parameter, slots in self._parameters_with_slots():
            pieces = substitute(parameter).split([slot.numel for slot in slots])
            for slot, piece in zip(slots, pieces, strict=True):
                object.__setattr__(slot.adapter, f"lora_{slot.factor}", piece.view(slot.shape))

    def _refresh(self) -> None:
        """Recompute what depends on masks and scalings, if any of them has changed."""
        version = sum(adapter.mask_version for adapter in self._adapters)
        if version == self._version:
            return
        self._version = version
        device = self.factors.device
        pairs = [(a.rank, *a.gain()) for a in self._adapters]
        self._gain_L = torch.cat([factor_R.to(device).float() for _, factor_R, _ in pairs])
        self._added_L = None
        if any(added_R is not None for _, _, added_R in pairs):
            added = [torch.zeros(rank) if added_R is None else added_R for rank, _, added_R in pairs]
            self._added_L = torch.cat([added_R.to(device).float() for added_R in added])
        for stack in self._stacks:
            stack.refresh(device)

    def _add_penalty(self, penalty: OrthogonalityPenalty, grad: Tensor) -> None:
        flat = self.factors.detach()
        if flat.is_cuda:
            self._penalty_graph.add(penalty, self._stacks, self._version, flat, grad, self.largest)
            return
        for stack in self._stacks:
            stack.add_gradient(penalty, flat, grad)

    @property
    def penalty_is_graph(self) -> bool:
        """Whether the penalty of the last backward pass was launched as one CUDA graph."""
        return self._penalty_graph.captured

    def _penalty(self) -> OrthogonalityPenalty | None:
        """The penalty if it acts in this backward pass, else None."""
        first = self._adapters[0]
        if not isinstance(first, SVDLinear | TwoScaleLinear) or not first.training or not first._penalty:
            return None
        return first._penalty[0] if first._penalty[0].armed else None


def _drop_derived(adapter: RankedLinear) -> None:
    """Let an adapter compute with its factors alone, until a bank gives it more."""
    if isinstance(adapter, SVDLinear | PlainLinear):
        adapter.gain_R = None
    elif isinstance(adapter, TwoScaleLinear):
        adapter.merged_kI = None


class _Unpack(torch.autograd.Function):
    """Returns views of all factors, and E * mask * scaling of every adapter.

    Backward concatenates their gradients and adds the gradient of the penalty.
    """

    @staticmethod
    def forward(ctx: Any, factors: Tensor, sigmas: Tensor | None, bank: FactorBank) -> tuple[Tensor, ...]:
        ctx.bank, ctx.penalty = bank, bank._penalty()
        views = FactorBank._views(factors, bank._slots)
        gain_L = bank._gain_L if sigmas is None else sigmas.float() * bank._gain_L
        if bank._added_L is not None:
            gain_L = gain_L + bank._added_L
        return (*views, *bank._gains(gain_L))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None, None]:
        bank: FactorBank = ctx.bank
        count = len(bank._slots)
        flat = join(grads[:count], [slot.numel for slot in bank._slots], bank.factors)
        if ctx.penalty is not None:
            bank._add_penalty(ctx.penalty, flat)
        if not bank._sigma_slots:
            return flat, None, None
        grad_L = join(grads[count:], [adapter.rank for adapter in bank._adapters], bank.sigmas)
        return flat, (grad_L.float() * bank._gain_L).to(bank.sigmas.dtype), None
