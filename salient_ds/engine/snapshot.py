"""What a checkpoint holds, taken from a run that goes on: small state at once, tensors by a thread.

Masters, moments and statistics change in the optimizer's step and nowhere else. So the copy to host memory may take as
long as the next forward and backward pass, and whoever changes them waits for :attr:`Snapshot.taken` first.
"""

from __future__ import annotations

import threading
from io import BytesIO
from typing import Any

import torch
from torch import Tensor

from salient_ds.engine.shard_files import part_name, shard_key
from salient_ds.engine.state import AllocationState
from salient_ds.ranks import RankDecision
from salient_ds.zero.collectives import world
from salient_ds.zero.internals.engine_state import describe


class Snapshot:
    """The files of this process, as they will be written."""

    def __init__(self, state: AllocationState, extra: dict[str, Any]) -> None:
        """Note what there is to copy. Nothing is copied yet, and nothing may change before :attr:`taken` is set."""
        global_rank, world_size = world()
        self.shard = f"shard-{global_rank:05d}-of-{world_size:05d}.safetensors"
        self.tensors: dict[str, Tensor] = {}
        self._labels: dict[str, str] = {}  # of those that must be finite
        shards = state.shards
        if global_rank == 0 or not shards.replicated:
            for fragment in shards.layout.fragments:
                for kind, value in {"master": shards.master(fragment), **shards.moments(fragment)}.items():
                    key = shard_key(kind, fragment.name, fragment.lo)
                    self.tensors[key], self._labels[key] = value, f"the {kind} of {fragment.name}"
            for statistic, part, value in state.method.local_state():
                self.tensors[shard_key(statistic, part_name(part), part.lo)] = value
        self.objects = {f"process-{global_rank:05d}.pt": _serialised(_process_state(state))}
        if global_rank == 0:
            self.objects["shared.pt"] = _serialised(_shared_state(state, extra))
        self.taken = threading.Event()
        self._stream = torch.cuda.Stream(state.device) if state.device.type == "cuda" else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(state.device))

    def take(self) -> None:
        """Copy all tensors to host memory of their own. A thread may do that while forward and backward passes run."""
        try:
            if self._stream is None:
                self.tensors = {key: value.detach().cpu().clone() for key, value in self.tensors.items()}
                return
            with torch.cuda.stream(self._stream):
                self.tensors = {key: _to_host(value.detach()) for key, value in self.tensors.items()}
            self._stream.synchronize()
        finally:
            self.taken.set()

    def not_finite(self) -> str | None:
        """Which master or moment holds a value that is not finite, as a clause; None if all are finite."""
        for key, label in self._labels.items():
            finite = self.tensors[key].isfinite()
            if not bool(finite.all()):
                return f"{label} holds {int((~finite).sum())} values that are NaN or infinite"
        return None


def _to_host(value: Tensor) -> Tensor:
    if not value.is_cuda:
        return value.clone()
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)


def _serialised(facts: dict[str, Any]) -> bytes:
    buffer = BytesIO()
    torch.save(facts, buffer)
    return buffer.getvalue()


def _process_state(state: AllocationState) -> dict[str, Any]:
    found: dict[str, Any] = {"cpu_rng": torch.get_rng_state()}
    if state.device.type == "cuda":
        found["cuda_rng"] = torch.cuda.get_rng_state(state.device)
    return found


def _shared_state(state: AllocationState, extra: dict[str, Any]) -> dict[str, Any]:
    decisions = state.decisions
    return {
        "step": state.step,
        "kept": state.kept_N,
        "latest": _pack(decisions.latest),
        "held": _pack(decisions.held),
        "pending": [_pack(d) for d in decisions.pending],
        "method": state.method.shared_state(),
        **describe(state.engine),
        "extra": extra,
    }


def _pack(decision: RankDecision) -> dict[str, Any]:
    return {k: getattr(decision, k) for k in ("step", "budget", "mask_N", "threshold", "hold")}


def manifest_facts(state: AllocationState, identity: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says besides the list of files."""
    return {
        "step": state.step,
        "processes": world().world_size,
        "identity": identity,
        "parameters": {n: list(shape) for n, shape in state.shards.shapes.items()},
        "adapters": _describe_adapters(state),
        "in_full": _describe_in_full(state),
    }


def _describe_in_full(state: AllocationState) -> list[dict[str, Any]]:
    """The parameters that are trained in full: name, shape, and all names, of which a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in state.adapted.model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [
        {"name": name, "shape": list(state.shards.shapes[name]), "names": names[key]}
        for key, name in state.shards.in_full.items()
    ]


def _describe_adapters(state: AllocationState) -> list[dict[str, Any]]:
    """What an export must know about every adapter, since it has no model: path, scaling, form and factor names."""
    return [
        {
            "name": name,
            "form": type(adapter).__name__,
            "drops_masked": adapter.drops_masked,
            "rank": adapter.rank,
            "scaling": adapter.scaling,
            "factors": {factor: f"{name}.lora_{factor}" for factor in adapter.factors()},
            "shapes": {f: list(a.shape) for f, a in adapter.factors().items()},
        }
        for name, adapter in state.adapted.adapters.items()
    ]
