"""The adapted model with its adapters packed into banks, each of which holds the factors of a few layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from salient_ds.adapters.bank import FactorBank
from salient_ds.adapters.ranked_linear import RankedLinear

LAYERS_PER_BANK = 4
"""A compromise. DeepSpeed spends 0.3 ms of host time per trainable parameter in every backward pass, and more in the
step, so banks should be few. With all layers in one bank, gradients would be reduced only after the whole backward
pass."""


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
            self.banks[index] = bank.anew()
        self._compare()

    def keep_addresses(self) -> None:
        """See :meth:`FactorBank.keep_addresses`."""
        for bank in self.banks:
            assert isinstance(bank, FactorBank)
            bank.keep_addresses()

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
