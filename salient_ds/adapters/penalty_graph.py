"""The penalty's gradient of one bank as a CUDA graph.

Some sixty small kernels per layer keep the GPU busy for 0.3 ms and the host for more than one (LLaMA-7B, H100), and the
host is what training steps wait for. What they read lies at fixed addresses and changes rarely in shape, so that they
are recorded once and launched as one.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from salient_ds.adapters.orthogonality import OrthogonalityPenalty
from salient_ds.adapters.stacked_penalty import Stack, add_penalty_gradient


class PenaltyGraph:
    """Adds the penalty's gradients of the factors in one flat parameter; anything but new values is recorded anew."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._extra = torch.zeros(0)
        self._notes: list[tuple[Tensor, int, Tensor]] = []

    def add(
        self, penalty: OrthogonalityPenalty, stacks: Sequence[Stack], version: int, flat: Tensor, grad: Tensor
    ) -> None:
        """Add to ``grad`` in place and note the norms, as :func:`add_penalty_gradient` for every stack.

        Args:
            version: grows with every change of the stacks' masks.
            flat: the parameter that holds the factors.
        """
        key = (version, penalty.coefficient, penalty.gradient_scale, flat.data_ptr(), flat.numel())
        if key != self._key:
            # the first time as it is: kernels are loaded then, which a recording must not do
            self._key, self._graph = key, None
            for stack in stacks:
                add_penalty_gradient(penalty, stack, flat, grad)
            return
        if self._graph is None:
            self._record(penalty, stacks, flat)
        assert self._graph is not None
        self._graph.replay()
        if penalty.coefficient > 0:
            grad.add_(self._extra)
        for note in self._notes:
            penalty.note(*note)

    def _record(self, penalty: OrthogonalityPenalty, stacks: Sequence[Stack], flat: Tensor) -> None:
        shared = _shared(flat.device)
        self._extra = shared.scratch(flat)
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(flat.device)
        shared.stream.wait_stream(current)
        with torch.cuda.stream(shared.stream), penalty.collect_notes() as self._notes:
            # other threads (collectives' watchdogs) may go on as they like
            self._graph.capture_begin(pool=shared.pool, capture_error_mode="thread_local")
            try:
                for stack in stacks:
                    add_penalty_gradient(penalty, stack, flat, self._extra, accumulate=False)
            finally:
                self._graph.capture_end()
        current.wait_stream(shared.stream)


class _Shared:
    """What all graphs of a device share. They are launched one after another on one stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._scratches: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()
        self._anchor = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            square = torch.ones(16, 16, device=device)
            torch.mm(square, square)  # makes the stream's workspace, outside any recording
            # A pool must not lose its last recording while memory from it is in use
            self._anchor.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            square.add_(1)
            self._anchor.capture_end()

    def scratch(self, like: Tensor) -> Tensor:
        """Memory for one bank's gradients, the same for all banks of one size; freed with the last graph over it."""
        key = (like.numel(), like.dtype)
        found = self._scratches.get(key)
        if found is None:
            found = torch.empty_like(like)
            self._scratches[key] = found
        return found


@functools.cache
def _shared(device: torch.device) -> _Shared:
    return _Shared(device)
