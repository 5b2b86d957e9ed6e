"""Brings a fresh engine to the state of an earlier one: from a checkpoint, or from the engine before a resize."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from salient_ds.engine.identity import CHANGEABLE
from salient_ds.engine.shards import ShardMap
from salient_ds.zero.internals.engine_state import adopt, sync_copies

Read = Callable[[str, str, int, int], Tensor]
"""``read(kind, name, lo, numel)`` returns elements [lo, lo + numel) of a trainable tensor; ``kind`` is "master" or the
name of a moment."""


def restore(inner: Any, shards: ShardMap, state: dict[str, Any], read: Read, renewed: Collection[str] = ()) -> None:
    """Bring a fresh DeepSpeed engine to ``state``, and fill the masters, moments and copies of its shards.

    Args:
        state: from :func:`salient_ds.zero.internals.engine_state.describe`.
        read: where the values of masters and moments come from.
        renewed: settings of :data:`salient_ds.engine.identity.CHANGEABLE` that stay as the fresh engine has them. A
            renewed learning rate or schedule is that of the current step, as if the run had begun with it.
    """
    keep = {entry for key in renewed for entry in CHANGEABLE[key]}
    fragments = shards.layout.fragments
    for fragment in fragments:
        shards.master(fragment).copy_(read("master", fragment.name, fragment.lo, fragment.numel))
    adopt(inner, shards.layout.buffers, state, keep)
    for fragment in fragments if state["optimizer_steps"] is not None else []:
        for moment, target in shards.moments(fragment).items():
            target.copy_(read(moment, fragment.name, fragment.lo, fragment.numel))
    sync_copies(inner)
