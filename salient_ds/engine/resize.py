"""Changes the number of rows during training: adapters, masters and moments are resized, and training continues.

Shape legend: N = rows of the initial layout (all that may ever exist), n = rows that exist now, R = rows of one matrix.

1. Factor by factor, the rows that stay are summed over processes (every element has one owner).
2. The engine that owns the adapters is retired, and banks of the new size are made.
3. A new engine over the same module takes over masters, moments, step counts, learning-rate schedule and loss scale.

New rows get the values that they would have been drawn with at the start, and moments of zero. The frozen base is not
touched.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from salient_ds.adapters.growing import GrowingLinear
from salient_ds.adapters.inject import AdaptedModel
from salient_ds.adapters.ranked_linear import FactorAddress
from salient_ds.engine.restore import restore
from salient_ds.engine.shards import Owned, ShardMap
from salient_ds.engine.state import AllocationState
from salient_ds.methods.duties import ResizableMethod
from salient_ds.ranks import RankLayout
from salient_ds.zero.collectives import world
from salient_ds.zero.internals.engine_state import describe, retire
from salient_ds.zero.internals.monitors import keeping_monitors, monitors_of

Rebuild = Callable[[], Any]
"""Builds a new DeepSpeed engine over the adapted model."""
Collected = dict[tuple[str, str], Tensor]
"""Whole masters and moments on every process: (kind, name) -> fp32 (elements,)."""


@torch.no_grad()
def resize(state: AllocationState, rebuild: Rebuild, kept_N: Tensor) -> None:
    """Resize every adapter to the rows ``kept_N`` (bool, CPU) and continue with a new engine.

    Collective: all processes call it with the same mask, between two steps.

    Args:
        kept_N: rows of the initial layout that exist from now on; some of them may be new.
    """
    method, before_N = state.method, state.kept_N
    assert isinstance(method, ResizableMethod), f"{method.name} cannot go on with other rows"
    latest = state.decisions.latest
    decision = replace(latest, mask_N=state.in_initial_rows(latest.mask_N)[kept_N])
    found = collect(state.shards, kept_N[before_N], state.device)
    inner, monitors = describe(state.engine), monitors_of(state.engine)
    retire(state.engine)
    set_rows(state.adapted, state.initial_layout, kept_N)
    state.adapted.set_mask(decision.mask_N, method.policy.gate_forward, decision.hold)
    method.resized(state.adapted.layout)
    state.forget()
    gc.collect()  # the old engine is part of reference cycles, and its buffers are large
    add_new_rows(found, state.adapted, state.initial_layout, before_N, kept_N)
    with keeping_monitors(monitors):
        fresh = rebuild()
    state.adopt(fresh, decision, kept_N)

    def read(kind: str, name: str, lo: int, numel: int) -> Tensor:
        return found[kind, name][lo : lo + numel]

    restore(state.engine, state.shards, inner, read)


def all_rows(adapted: AdaptedModel) -> RankLayout:
    """The layout of fresh adapters, with all rows that they may ever have."""
    ranks = tuple(a.most if isinstance(a, GrowingLinear) else a.rank for a in adapted.adapters.values())
    return replace(adapted.layout, ranks=ranks)


def first_rows(layout: RankLayout, room_M: Sequence[int]) -> Tensor:
    """A mask over the rows of ``layout`` (bool, CPU) that selects the first ``room_M[k]`` rows of every matrix k."""
    return torch.cat([torch.arange(rank) < room for rank, room in zip(layout.ranks, room_M, strict=True)])


def set_rows(adapted: AdaptedModel, initial: RankLayout, kept_N: Tensor) -> None:
    """Give every adapter as many rows as its part of ``kept_N`` (bool, CPU) has. Values are zero until written."""
    ranks = [int(part.sum()) for part in kept_N.split(list(initial.ranks))]
    for adapter, rank in zip(adapted.adapters.values(), ranks, strict=True):
        adapter.resize(rank)
    assert adapted.packed is not None, "only packed adapters can have their size changed"
    adapted.packed.repack()
    adapted.layout = replace(adapted.layout, ranks=tuple(ranks))


def collect(shards: ShardMap, stay_n: Tensor, device: torch.device) -> Collected:
    """Gather masters and moments of the rows ``stay_n`` (bool) on every process.

    Works factor by factor, so that no more than one factor is ever held with the rows that do not stay.
    """
    masks = [part.to(device) for part in stay_n.split(list(shards.rank_layout.ranks))]
    moments = shards.moment_names()
    found: Collected = {}
    for name, shape in shards.shapes.items():
        owned = shards.owned.get(name)
        numel = int(torch.Size(shape).numel())
        for kind in ("master", *moments):
            whole = torch.zeros(numel, dtype=torch.float32, device=device)
            for fragment in shards.by_name.get(name, []):
                source = shards.master(fragment) if kind == "master" else shards.moments(fragment)[kind]
                whole[fragment.lo : fragment.lo + fragment.numel] = source.to(device)
            if world().world_size > 1 and not shards.replicated:
                dist.all_reduce(whole)
            found[kind, name] = whole if owned is None else _survivors(whole, owned, masks[owned.module])
    return found


def add_new_rows(
    found: Collected, adapted: AdaptedModel, initial: RankLayout, before_N: Tensor, kept_N: Tensor
) -> None:
    """Add to ``found`` the rows of ``kept_N`` that did not exist before (``before_N``), one matrix after the other."""
    sizes = list(initial.ranks)
    kinds = {kind for kind, _ in found}
    parts = zip(adapted.adapters.items(), before_N.split(sizes), kept_N.split(sizes), strict=True)
    for (path, adapter), was_R, is_R in parts:
        new_R = is_R & ~was_R
        if not bool(new_R.any()):
            continue
        assert isinstance(adapter, GrowingLinear), "only adapters that grow get new rows"
        starts = adapter.start_values()
        for factor, address in adapter.factors().items():
            assert address.rank_axis is not None
            new = starts[factor].index_select(address.rank_axis, new_R.nonzero().view(-1))
            for kind in kinds:
                key = kind, f"{path}.lora_{factor}"
                found[key] = _with_rows(found[key], address, was_R[is_R], new if kind == "master" else None)


def _with_rows(old: Tensor, address: FactorAddress, old_r: Tensor, new: Tensor | None) -> Tensor:
    """A whole factor, flat, of old and new rows.

    Args:
        old: values of the old rows, in order.
        old_r: which of the resized factor's rows are old ones (bool).
        new: values of all other rows, in order; None: they are zero.
    """
    axis = address.rank_axis
    assert axis is not None
    whole = torch.zeros(address.shape, dtype=old.dtype, device=old.device)
    shape = list(address.shape)
    shape[axis] = int(old_r.sum())
    whole.index_copy_(axis, old_r.nonzero().view(-1).to(old.device), old.view(shape))
    if new is not None:
        whole.index_copy_(axis, (~old_r).nonzero().view(-1).to(old.device), new.to(old.device))
    return whole.view(-1)


def _survivors(whole: Tensor, owned: Owned, mask_R: Tensor) -> Tensor:
    axis = owned.address.rank_axis
    if axis is None:
        return whole
    return whole.view(owned.address.shape).index_select(axis, mask_R.nonzero().view(-1)).reshape(-1).clone()
