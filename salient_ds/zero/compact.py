"""Dropping pruned rows in flight: smaller adapters, masters and moments, the same training.

Shape legend: N = rows at the start of the run, n = rows that are there now.

Row by row the survivors are summed over processes (every element has one owner), the engine that owns the adapters is
retired, banks of the smaller size are made, and a new engine over the same module takes masters, moments, step counts,
learning-rate schedule and loss scale over. The frozen base is not touched.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.methods.base import RankLayout
from salient_ds.zero.collectives import world
from salient_ds.zero.layouts import retire
from salient_ds.zero.optimizer_state import describe, restore
from salient_ds.zero.shards import Owned, ShardMap

if TYPE_CHECKING:
    from salient_ds.zero.engine import AllocatingEngine

Rebuild = Callable[[], Any]
"""A new DeepSpeed engine over the adapted model."""


@runtime_checkable
class ResizableMethod(Protocol):
    """A method that can go on with fewer rows."""

    def resized(self, layout: RankLayout) -> None:
        """Pruned rows are gone: from the next step on rows are numbered by ``layout``. Called right after an event."""
        ...


@dataclass(frozen=True)
class Compactor:
    """When rows are dropped, and how the engine is made anew."""

    rebuild: Rebuild
    when: Literal["last", "every"]

    def after_step(self, engine: AllocatingEngine) -> float | None:
        """Compact if a decision that is to be compacted has just come into force; seconds it took, None if not."""
        force, events = engine.in_force, engine.method.events
        decision = force.held
        if not events or force.pending or not decision.hold:
            return None
        if self.when == "last":
            due = engine.step >= events[-1].step  # later too: a checkpoint may come from a run without compaction
        else:
            due = engine.step - decision.step <= engine.method.policy.delay  # never inside a window
        if not due or bool(decision.mask_N.all()):
            return None
        began = time.perf_counter()
        compact(engine, self.rebuild)
        return time.perf_counter() - began


@torch.no_grad()
def compact(engine: AllocatingEngine, rebuild: Rebuild) -> None:
    """Drop all rows that the decision in force has pruned; called by all processes after a step."""
    method = engine.method
    assert isinstance(method, ResizableMethod), f"{method.name} cannot go on with fewer rows"
    mask_n = engine.in_force.held.mask_N
    survivors = collect(engine.shards, mask_n, engine.device)
    state = describe(engine.engine)
    retire(engine.engine)
    shrink(engine.adapted, mask_n)
    kept_N = engine.in_initial_rows(mask_n)
    method.resized(engine.adapted.layout)
    ones_n = torch.ones(engine.adapted.layout.total, dtype=torch.bool)
    decision = replace(engine.in_force.latest, mask_N=ones_n)
    engine.forget()
    gc.collect()  # the old engine is part of reference cycles, and its buffers are large
    engine.adopt(rebuild(), decision, kept_N)

    def read(kind: str, name: str, lo: int, numel: int) -> Tensor:
        return survivors[kind, name][lo : lo + numel]

    restore(engine.engine, engine.shards, state, read)


def shrink(adapted: AdaptedModel, mask_n: Tensor) -> None:
    """Make every adapter as small as its part of ``mask_n`` (bool, CPU); values are zero until somebody writes them."""
    layout = adapted.layout
    ranks = [int(part.sum()) for part in mask_n.split(list(layout.ranks))]
    for adapter, rank in zip(adapted.adapters.values(), ranks, strict=True):
        adapter.resize(rank)
    assert adapted.packed is not None, "only packed adapters can be made smaller"
    adapted.packed.repack()
    adapted.layout = replace(layout, ranks=tuple(ranks))


def collect(shards: ShardMap, mask_n: Tensor, device: torch.device) -> dict[tuple[str, str], Tensor]:
    """Masters and moments of the surviving rows, whole on every process: (kind, name) -> fp32 (elements,).

    One factor at a time: at no moment is more than one of them held at full size.
    """
    masks = [part.to(device) for part in mask_n.split(list(shards.rank_layout.ranks))]
    moments = _moment_names(shards)
    found: dict[tuple[str, str], Tensor] = {}
    for name, shape in shards.shapes.items():
        owned = shards.owned.get(name)
        numel = int(torch.Size(shape).numel())
        for kind in ("master", *moments):
            whole = torch.zeros(numel, dtype=torch.float32, device=device)
            for fragment in shards.by_name.get(name, []):
                source = shards.master(fragment) if kind == "master" else shards.moments(fragment)[kind]
                whole[fragment.lo : fragment.lo + fragment.numel] = source.to(device)
            if world()[1] > 1 and not shards.replicated:
                dist.all_reduce(whole)
            found[kind, name] = whole if owned is None else _survivors(whole, owned, masks[owned.module])
    return found


def _survivors(whole: Tensor, owned: Owned, mask_R: Tensor) -> Tensor:
    axis = owned.address.rank_axis
    if axis is None:
        return whole
    return whole.view(owned.address.shape).index_select(axis, mask_R.nonzero().view(-1)).reshape(-1).clone()


def _moment_names(shards: ShardMap) -> tuple[str, ...]:
    """The same on every process, also on one that owns no element."""
    mine = next((tuple(sorted(shards.moments(f))) for f in shards.layout.fragments), ())
    everyone: list[Any] = [mine]
    if world()[1] > 1:
        everyone = [None] * world()[1]
        dist.all_gather_object(everyone, mine)
    return max(everyone, key=len)
