"""Banks: the factors of a few decoder layers' adapters, packed into two flat parameters.

The optimizer and hooks then handle a few large tensors instead of many small ones. In a bank, an adapter's ``lora_A``,
``lora_B``, ... are views of the flat parameters instead of parameters. A forward pass creates new views when it reaches
the first of the bank's layers. Statistics, masks, checkpoints and export use addresses (:meth:`RankedLinear.factors`),
so they work the same whether or not factors are packed.

Shape legend: n = adapters in one stack, R = rank, I/O = in/out features, L = singular values of the layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
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

LAYERS_PER_BANK = 4
"""A compromise. DeepSpeed spends 0.3 ms of host time per trainable parameter in every backward pass, and more in the
step, so banks should be few. With all layers in one bank, gradients would be reduced only after the whole backward
pass."""


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
        self._kept_L: Tensor | None = None

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
        self._kept_L = self.factors.new_empty(sum(adapter.rank for adapter in self._adapters))

    def _gains(self, gain_L: Tensor) -> tuple[Tensor, ...]:
        """Gains in the factors' precision, one tensor for every adapter."""
        low_L = gain_L.to(self.factors.dtype) if self._kept_L is None else self._kept_L.copy_(gain_L)
        return low_L.split([a.rank for a in self._adapters])

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
            views = _Unpack.apply(self.factors, sigmas, self)
            for slot, view in zip(self._slots, views, strict=False):
                object.__setattr__(slot.adapter, f"lora_{slot.factor}", view)
            for adapter, gain_R in zip(self._adapters, views[len(self._slots) :], strict=True):
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


def layer_of(module_path: str) -> str:
    """Path of the layer that a module belongs to: everything up to and including the first number.

    Example: "model.layers.3.self_attn.q_proj" is in "model.layers.3". A path without a number gives "".
    """
    parts = module_path.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if first is None else ".".join(parts[: first + 1])


class PackedModel(nn.Module):
    """The adapted model and, beside it, the banks of its layers. The engine that owns the adapters trains this module.

    Banks are not children of the model, so operations on the model's parameters do not reach them.
    """

    def __init__(self, model: nn.Module, adapters: dict[str, RankedLinear]) -> None:
        super().__init__()
        self.model = model
        self.banks = nn.ModuleList()
        self._due: set[int] = set()
        """Banks that the current forward pass has not reached yet."""
        model.register_forward_pre_hook(self.begin)
        for paths in _in_groups(adapters):
            for path in paths:
                model.get_submodule(path).register_forward_pre_hook(self._unpacker(len(self.banks)))
            self.banks.append(FactorBank([[a for n, a in adapters.items() if layer_of(n) == path] for path in paths]))
        self._compare()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def begin(self, *_: Any) -> None:
        """Let every bank unpack when its layers are reached next. Generation calls the encoder before the model."""
        self._due = set(range(len(self.banks)))

    def _unpacker(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            if index not in self._due:  # also true when a layer is recomputed: its views still exist
                return
            self._due.remove(index)
            bank = self.banks[index]  # looked up here, because a compaction replaces banks
            assert isinstance(bank, FactorBank)
            bank.unpack()

        return hook

    def repack(self) -> None:
        """Create new banks for adapters that have been resized. All values are zero until the caller writes them."""
        for index, bank in enumerate(self.banks):
            assert isinstance(bank, FactorBank)
            self.banks[index] = new = FactorBank(bank.layers, copy=False)
            if bank._kept_L is not None:
                new.keep_addresses()
        self._compare()

    def _compare(self) -> None:
        """Tell every bank the size of the largest one."""
        banks = [bank for bank in self.banks if isinstance(bank, FactorBank)]
        for bank in banks:
            bank.largest = max(len(other.factors) for other in banks)


def _in_groups(adapters: Iterable[str]) -> list[list[str]]:
    """Paths of the layers that share a bank: adjacent ones of one module list."""
    groups: list[list[str]] = []
    for path in dict.fromkeys(layer_of(name) for name in adapters):
        siblings = groups and groups[-1][0].rpartition(".")[0] == path.rpartition(".")[0]
        if path and groups and groups[-1][0] and siblings and len(groups[-1]) < LAYERS_PER_BANK:
            groups[-1].append(path)
        else:
            groups.append([path])
    return groups
