"""The parts of adapter factors that this process holds: views for methods, writes for decisions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.adapters.ranked_linear import FactorAddress
from salient_ds.ranks import AdamSettings, Part, RankLayout
from salient_ds.zero.collectives import from_everyone
from salient_ds.zero.internals.engine_state import basic_optimizer
from salient_ds.zero.internals.layouts import BufferLayout, Fragment, copies, full_numel, full_shape, read_layout


@dataclass(frozen=True)
class Owned:
    """One factor of one adapted matrix: its name in checkpoints and its address."""

    name: str
    module: int
    factor: str
    address: FactorAddress

    @property
    def numel(self) -> int:
        return math.prod(self.address.shape)


def owned_factors(adapted: AdaptedModel) -> list[Owned]:
    """Every factor of every adapter. The names do not depend on how parameters are packed."""
    return [
        Owned(f"{path}.lora_{factor}", module, factor, address)
        for module, (path, adapter) in enumerate(adapted.adapters.items())
        for factor, address in adapter.factors().items()
    ]


def split_by_factor(fragments: list[Fragment], owned: list[Owned]) -> list[Fragment]:
    """Cut fragments of packed parameters at the borders of factors.

    Each piece gets the name of its factor, and its first element is counted from the start of that factor.
    """
    inside: dict[int, list[Owned]] = defaultdict(list)
    for factor in owned:
        inside[id(factor.address.parameter)].append(factor)
    out = []
    for fragment in fragments:
        members = inside.get(id(fragment.parameter))
        if members is None:
            out.append(fragment)
            continue
        for factor in members:
            start = factor.address.offset
            first = max(fragment.lo, start)
            last = min(fragment.lo + fragment.numel, start + factor.numel)
            if first < last:
                shift = first - fragment.lo
                out.append(
                    replace(fragment, name=factor.name, lo=first - start, numel=last - first, off=fragment.off + shift)
                )
    return out


class LocalView:
    """A :class:`StepView` of one optimizer buffer (of all of them where nothing is partitioned)."""

    def __init__(
        self, key: str, pieces: list[tuple[Part, Fragment]], buffers: list[Tensor], layout: RankLayout
    ) -> None:
        self.key = key
        self.optimizer: Any = None
        """The basic torch optimizer. Whoever builds the view sets it."""
        self.parts = tuple(part for part, _ in pieces)
        self._at = dict(pieces)
        self._buffers = buffers
        sigmas = [(part, fragment) for part, fragment in pieces if part.factor == "E"]
        self._runs = _merge_runs([fragment for _, fragment in sigmas])
        device = buffers[0].device if buffers else torch.device("cpu")
        spans = [torch.arange(part.numel) + layout.offsets[part.module] + part.lo for part, _ in sigmas]
        self.rows_n = torch.cat(spans).to(device) if spans else torch.zeros(0, dtype=torch.int64, device=device)

    def value(self, part: Part) -> Tensor:
        return self.span_value((part,))

    def grad(self, part: Part) -> Tensor:
        return self.span_grad((part,))

    def spans(self, parts: Sequence[Part]) -> list[tuple[Part, ...]]:
        """``parts`` in the order in which they lie; those that lie side by side in one buffer are together."""
        left = sorted(parts, key=lambda part: (self._at[part].buffer, self._at[part].off))
        found = []
        for _, _, numel in _merge_runs([self._at[part] for part in left]):
            count, filled = 0, 0
            while filled < numel:
                filled += left[count].numel
                count += 1
            found.append(tuple(left[:count]))
            del left[:count]
        return found

    def span_value(self, span: tuple[Part, ...]) -> Tensor:
        fragment = self._at[span[0]]
        return _slice(self._buffers[fragment.buffer].data, fragment.off, sum(part.numel for part in span))

    def span_grad(self, span: tuple[Part, ...]) -> Tensor:
        fragment = self._at[span[0]]
        grad = self._buffers[fragment.buffer].grad
        assert grad is not None, "gradients are only there inside the optimizer's step"
        return _slice(grad, fragment.off, sum(part.numel for part in span))

    def span_moments(self, span: tuple[Part, ...]) -> dict[str, Tensor]:
        fragment = self._at[span[0]]
        whole = replace(fragment, numel=sum(part.numel for part in span))
        return _moments(self.optimizer, self._buffers[fragment.buffer], whole)

    def moments(self, part: Part) -> dict[str, Tensor]:
        """Live slices of the optimizer's elementwise state for ``part``; empty before the first step."""
        return self.span_moments((part,))

    def settings(self, part: Part) -> AdamSettings:
        """The optimizer's settings for ``part``. Valid only inside its step."""
        buffer = self._buffers[self._at[part].buffer]
        (group,) = [g for g in self.optimizer.param_groups if any(t is buffer for t in g["params"])]
        decoupled = bool(getattr(self.optimizer, "adam_w_mode", isinstance(self.optimizer, torch.optim.AdamW)))
        return AdamSettings(float(group["lr"]), group["betas"], group["eps"], group["weight_decay"], decoupled)

    def sigma(self) -> tuple[Tensor, Tensor]:
        pieces = self.sigma_slices()
        return self.rows_n, torch.cat(pieces) if pieces else self.rows_n.to(torch.float32)

    def sigma_grad(self) -> Tensor:
        pieces = []
        for index, off, numel in self._runs:
            grad = self._buffers[index].grad
            assert grad is not None, "gradients are only there inside the optimizer's step"
            pieces.append(_slice(grad, off, numel))
        return torch.cat(pieces) if pieces else self.rows_n.to(torch.float32)

    def sigma_slices(self) -> list[Tensor]:
        """Live slices of the masters. Concatenated, they are the values of :meth:`sigma`."""
        return [_slice(self._buffers[b].data, off, numel) for b, off, numel in self._runs]


class ShardMap:
    """What this process holds of an engine's trainable parameters, factor by factor."""

    def __init__(self, engine: Any, adapted: AdaptedModel) -> None:
        self.engine = engine
        self.owned: dict[str, Owned] = {owned.name: owned for owned in owned_factors(adapted)}
        whole: BufferLayout = read_layout(engine)
        modules = adapted.names_in_full
        named = [replace(f, name=modules.get(id(f.parameter), f.name)) for f in whole.fragments]
        self.layout = replace(whole, fragments=split_by_factor(named, list(self.owned.values())))
        self.rank_layout = adapted.layout
        self.in_full = modules
        """By id of each parameter that is trained in full: its path in the model."""
        self.shapes = self._shapes(engine)
        self.by_name: dict[str, list[Fragment]] = defaultdict(list)
        for fragment in self.layout.fragments:
            self.by_name[fragment.name].append(fragment)
        self.views = self._make_views()

    def _shapes(self, engine: Any) -> dict[str, tuple[int, ...]]:
        """Full shape of every trainable tensor: factors first, then parameters that belong to no adapter."""
        packed = {id(owned.address.parameter) for owned in self.owned.values()}
        shapes = {name: owned.address.shape for name, owned in self.owned.items()}
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad and full_numel(parameter) > 0 and id(parameter) not in packed:
                shapes[self.in_full.get(id(parameter), name)] = full_shape(parameter)
        return shapes

    @property
    def replicated(self) -> bool:
        return self.layout.replicated

    def part(self, fragment: Fragment) -> Part | None:
        """The fragment as a :class:`Part` for methods; None for a trainable parameter that is no adapter factor."""
        owned = self.owned.get(fragment.name)
        if owned is None:
            return None
        where = owned.address
        return Part(owned.factor, owned.module, fragment.lo, fragment.numel, where.shape, where.rank_axis)

    def _make_views(self) -> dict[int, LocalView]:
        """Views by buffer index. Where nothing is partitioned, one view (index 0) covers all buffers."""
        grouped: dict[int, list[tuple[Part, Fragment]]] = defaultdict(list)
        for fragment in self.layout.fragments:
            part = self.part(fragment)
            if part is not None:
                grouped[0 if self.replicated else fragment.buffer].append((part, fragment))
        buffers = self.layout.buffers
        views = {i: LocalView(f"buffer{i}", grouped[i], buffers, self.rank_layout) for i in sorted(grouped)}
        for view in views.values():
            view.optimizer = basic_optimizer(self.engine)
        return views

    def master(self, fragment: Fragment) -> Tensor:
        """Live fp32 master slice (numel,)."""
        return _slice(self.layout.buffers[fragment.buffer].data, fragment.off, fragment.numel)

    def moments(self, fragment: Fragment) -> dict[str, Tensor]:
        """Live slices of the optimizer's elementwise state ("exp_avg", "exp_avg_sq"); empty before the first step."""
        return _moments(basic_optimizer(self.engine), self.layout.buffers[fragment.buffer], fragment)

    def moment_names(self) -> tuple[str, ...]:
        """Names of the optimizer's moments: the same on every process, even on one that owns no element. Collective."""
        mine = next((tuple(sorted(self.moments(f))) for f in self.layout.fragments), ())
        return max(from_everyone(mine), key=len)

    def copies(self, owned: Owned) -> Iterator[tuple[Tensor, int]]:
        """Training-precision copies of a factor on this process as (live slice, first element) pairs."""
        start, end = owned.address.offset, owned.address.offset + owned.numel
        for copy, lo in copies(owned.address.parameter):
            first, last = max(start, lo), min(end, lo + copy.numel())
            if first < last:
                yield copy[first - lo : last - lo], first - start

    @torch.no_grad()
    def zero_rows(self, owned: Owned, drop_R: Tensor, moments: bool) -> None:
        """Zero rows of one factor in the master, in its copies and, if asked, in both moments. No communication.

        Args:
            owned: a factor. Nothing happens if it has no rank axis, because all rows share it.
            drop_R: bool (R,), True = zero.
            moments: zero the Adam moments too.
        """
        self.write_rows(owned, drop_R, 0.0, moments)

    @torch.no_grad()
    def write_rows(self, owned: Owned, rows_R: Tensor, value: float, zero_moments: bool) -> None:
        """Like :meth:`zero_rows`, but write ``value`` into master and copies."""
        if owned.address.rank_axis is None:
            return
        rows = _expand(rows_R, owned.address.shape, owned.address.rank_axis)
        for fragment in self.by_name[owned.name]:
            part = rows[fragment.lo : fragment.lo + fragment.numel]
            master = self.master(fragment)
            master.masked_fill_(part.to(master.device), value)
            for moment in self.moments(fragment).values() if zero_moments else []:
                moment.masked_fill_(part.to(moment.device), 0)
        for copy, lo in self.copies(owned):
            copy.masked_fill_(rows[lo : lo + copy.numel()].to(copy.device), value)


def _moments(optimizer: Any, buffer: Tensor, fragment: Fragment) -> dict[str, Tensor]:
    return {
        key: _slice(value, fragment.off, fragment.numel)
        for key, value in optimizer.state.get(buffer, {}).items()
        if torch.is_tensor(value) and value.numel() == buffer.numel() and value.dim() > 0
    }


def _expand(drop_R: Tensor, shape: tuple[int, ...], rank_axis: int) -> Tensor:
    """Expand a mask over rows to one over all elements of a flattened factor."""
    view = [1] * len(shape)
    view[rank_axis] = -1
    return drop_R.view(view).expand(shape).reshape(-1)


def _slice(tensor: Tensor, off: int, numel: int) -> Tensor:
    return tensor.view(-1)[off : off + numel]


def _merge_runs(fragments: list[Fragment]) -> list[tuple[int, int, int]]:
    """(buffer, off, numel) of the fragments, adjacent ones joined: one kernel per run instead of one per matrix."""
    runs: list[tuple[int, int, int]] = []
    for fragment in fragments:
        if runs and runs[-1][0] == fragment.buffer and runs[-1][1] + runs[-1][2] == fragment.off:
            buffer, off, numel = runs[-1]
            runs[-1] = (buffer, off, numel + fragment.numel)
        else:
            runs.append((fragment.buffer, fragment.off, fragment.numel))
    return runs
