"""Adapter factors seen through their local shards: views for the methods, writes for the decisions."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.methods.base import Part, RankLayout
from salient_ds.zero.layouts import Fragment, Layout, copies, full_numel, read_layout


@dataclass(frozen=True)
class Owner:
    """Which factor of which adapted matrix a parameter is."""

    factor: str
    module: int
    shape: tuple[int, ...]
    rank_axis: int | None


def owners_of(adapted: AdaptedModel) -> dict[int, Owner]:
    """Factor of every adapter parameter, by ``id(parameter)``."""
    found = {}
    for module, adapter in enumerate(adapted.adapters.values()):
        for factor, address in adapter.factors().items():
            found[id(address.parameter)] = Owner(factor, module, address.shape, address.rank_axis)
    return found


class LocalView:
    """One buffer (or, where nothing is partitioned, all of them) as methods see it; a :class:`StepView`."""

    def __init__(
        self, key: str, pieces: list[tuple[Part, Fragment]], buffers: list[Tensor], layout: RankLayout
    ) -> None:
        self.key = key
        self.parts = tuple(part for part, _ in pieces)
        self._at = dict(pieces)
        self._buffers = buffers
        sigmas = [(part, fragment) for part, fragment in pieces if part.factor == "E"]
        self._runs = _merge_runs([fragment for _, fragment in sigmas])
        device = buffers[0].device if buffers else torch.device("cpu")
        spans = [torch.arange(part.numel) + layout.offsets[part.module] + part.lo for part, _ in sigmas]
        self.rows_n = torch.cat(spans).to(device) if spans else torch.zeros(0, dtype=torch.int64, device=device)

    def value(self, part: Part) -> Tensor:
        fragment = self._at[part]
        return _slice(self._buffers[fragment.buffer].data, fragment.off, fragment.numel)

    def grad(self, part: Part) -> Tensor:
        fragment = self._at[part]
        grad = self._buffers[fragment.buffer].grad
        assert grad is not None, "gradients are only there inside the optimizer's step"
        return _slice(grad, fragment.off, fragment.numel)

    def sigma(self) -> tuple[Tensor, Tensor]:
        pieces = self.sigma_slices()
        return self.rows_n, torch.cat(pieces) if pieces else self.rows_n.to(torch.float32)

    def sigma_slices(self) -> list[Tensor]:
        """Live slices of the masters whose concatenation is ``sigma()``."""
        return [_slice(self._buffers[b].data, off, numel) for b, off, numel in self._runs]


class ShardMap:
    """All trainable parameters of an engine on this process."""

    def __init__(self, engine: Any, adapted: AdaptedModel) -> None:
        self.engine = engine
        self.layout: Layout = read_layout(engine)
        self.owners = owners_of(adapted)
        self.rank_layout = adapted.layout
        self.parameters: dict[str, nn.Parameter] = {
            n: p for n, p in engine.module.named_parameters() if p.requires_grad and full_numel(p) > 0
        }
        self.by_parameter: dict[int, list[Fragment]] = defaultdict(list)
        for fragment in self.layout.fragments:
            self.by_parameter[id(fragment.parameter)].append(fragment)
        self.views = self._make_views()

    @property
    def replicated(self) -> bool:
        return self.layout.replicated

    def part(self, fragment: Fragment) -> Part | None:
        """The fragment in the methods' terms; None for a trainable parameter that is no adapter factor."""
        owner = self.owners.get(id(fragment.parameter))
        if owner is None:
            return None
        return Part(owner.factor, owner.module, fragment.lo, fragment.numel, owner.shape, owner.rank_axis)

    def _make_views(self) -> dict[int, LocalView]:
        """Views by buffer index; where nothing is partitioned one view (index 0) covers all buffers."""
        grouped: dict[int, list[tuple[Part, Fragment]]] = defaultdict(list)
        for fragment in self.layout.fragments:
            part = self.part(fragment)
            if part is not None:
                grouped[0 if self.replicated else fragment.buffer].append((part, fragment))
        return {i: LocalView(f"buffer{i}", grouped[i], self.layout.buffers, self.rank_layout) for i in sorted(grouped)}

    def master(self, fragment: Fragment) -> Tensor:
        """Live fp32 master slice (numel,)."""
        return _slice(self.layout.buffers[fragment.buffer].data, fragment.off, fragment.numel)

    def moments(self, fragment: Fragment) -> dict[str, Tensor]:
        """Live slices of the optimizer's elementwise state ("exp_avg", "exp_avg_sq"); empty before the first step."""
        buffer = self.layout.buffers[fragment.buffer]
        state = self.engine.basic_optimizer.state.get(buffer, {})
        return {
            key: _slice(value, fragment.off, fragment.numel)
            for key, value in state.items()
            if torch.is_tensor(value) and value.numel() == buffer.numel() and value.dim() > 0
        }

    @torch.no_grad()
    def zero_rows(self, parameter: nn.Parameter, drop_R: Tensor, moments: bool) -> None:
        """Zero the given ranks of one factor in master, copies and, if asked, both moments. No communication.

        Args:
            parameter: a factor of an adapter; nothing happens if all its ranks share it.
            drop_R: bool (R,), True = zero.
        """
        self.write_rows(parameter, drop_R, 0.0, moments)

    @torch.no_grad()
    def write_rows(self, parameter: nn.Parameter, rows_R: Tensor, value: float, zero_moments: bool) -> None:
        """As :meth:`zero_rows`, with ``value`` in master and copies."""
        owner = self.owners[id(parameter)]
        if owner.rank_axis is None:
            return
        rows = _expand(rows_R, owner.shape, owner.rank_axis)
        for fragment in self.by_parameter[id(parameter)]:
            part = rows[fragment.lo : fragment.lo + fragment.numel]
            master = self.master(fragment)
            master.masked_fill_(part.to(master.device), value)
            for moment in self.moments(fragment).values() if zero_moments else []:
                moment.masked_fill_(part.to(moment.device), 0)
        for copy, lo in copies(parameter):
            copy.masked_fill_(rows[lo : lo + copy.numel()].to(copy.device), value)


def _expand(drop_R: Tensor, shape: tuple[int, ...], rank_axis: int) -> Tensor:
    """The rank mask for every element of a flattened factor."""
    view = [1] * len(shape)
    view[rank_axis] = -1
    return drop_R.view(view).expand(shape).reshape(-1)


def _slice(tensor: Tensor, off: int, numel: int) -> Tensor:
    return tensor.view(-1)[off : off + numel]


def _merge_runs(fragments: list[Fragment]) -> list[tuple[int, int, int]]:
    """(buffer, off, numel) with neighbours joined: one kernel per run instead of one per matrix."""
    runs: list[tuple[int, int, int]] = []
    for fragment in fragments:
        if runs and runs[-1][0] == fragment.buffer and runs[-1][1] + runs[-1][2] == fragment.off:
            buffer, off, numel = runs[-1]
            runs[-1] = (buffer, off, numel + fragment.numel)
        else:
            runs.append((fragment.buffer, fragment.off, fragment.numel))
    return runs
