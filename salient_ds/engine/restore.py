"""Brings a fresh engine to the state of an earlier one: from a checkpoint, or from the engine before a resize."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from salient_ds.engine.shards import ShardMap
from salient_ds.zero.internals.engine_state import adopt, sync_copies

Read = Callable[[str, str, int, int], Tensor]
"""``read(kind, name, lo, numel)`` returns elements [lo, lo + numel) of a trainable tensor; ``kind`` is "master" or the
name of a moment."""


def restore(inner: Any, shards: ShardMap, state: dict[str, Any], read: Read) -> None:
    """Bring a fresh DeepSpeed engine to ``state``, and fill the masters, moments and copies of its shards.

    Args:
        state: from :func:`salient_ds.zero.internals.engine_state.describe`.
        read: where the values of masters and moments come from.
    """
    fragments = shards.layout.fragments
    for fragment in fragments:
        shards.master(fragment).copy_(read("master", fragment.name, fragment.lo, fragment.numel))
    adopt(inner, shards.layout.buffers, state)
    for fragment in fragments if state["optimizer_steps"] is not None else []:
        for moment, target in shards.moments(fragment).items():
            target.copy_(read(moment, fragment.name, fragment.lo, fragment.numel))
    sync_copies(inner)
