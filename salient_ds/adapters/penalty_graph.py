"""The penalty's gradient of one bank as a CUDA graph.

Some sixty small kernels per layer keep the GPU busy for 0.3 ms and the host for more than one (LLaMA-7B, H100), and the
host is what training steps wait for. What they read lies at fixed addresses and changes rarely in shape, so that they
are recorded once and launched as one.
"""

from __future__ import annotations

import contextlib
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
        self._scratch = self._extra = torch.zeros(0)
        self._notes: list[tuple[Tensor, int, Tensor]] = []

    def add(
        self,
        penalty: OrthogonalityPenalty,
        stacks: Sequence[Stack],
        version: int,
        flat: Tensor,
        grad: Tensor,
        largest: int,
    ) -> None:
        """Add to ``grad`` in place and note the norms, as :func:`add_penalty_gradient` for every stack.

        Args:
            version: grows with every change of the stacks' masks.
            flat: the parameter that holds the factors.
            largest: elements of the largest such parameter; all share memory of its size.
        """
        key = (version, penalty.coefficient, penalty.gradient_scale, flat.data_ptr(), flat.numel())
        if key != self._key:
            # The first time kernel by kernel: they are loaded then, which a recording must not do
            self._key, self._graph = key, None
            self._scratch = _shared(flat.device).scratch(flat, largest)
            self._extra = self._scratch[: flat.numel()]
            self._notes = self._run(penalty, stacks, flat, None)
        elif self._graph is None:
            self._record(penalty, stacks, flat)
        if self._graph is not None:
            self._graph.replay()
        if penalty.coefficient > 0:
            grad.add_(self._extra)
        for note in self._notes:
            penalty.note(*note)

    def _run(
        self, penalty: OrthogonalityPenalty, stacks: Sequence[Stack], flat: Tensor, outs: list[Tensor] | None
    ) -> list[tuple[Tensor, int, Tensor]]:
        """Fill the scratch; the norms, in ``outs`` if given."""
        with penalty.collect_notes() as notes:
            for stack in stacks:
                add_penalty_gradient(penalty, stack, flat, self._extra, accumulate=False)
        if outs is None:
            return notes
        return [(slots, term, out.copy_(norm)) for (slots, term, norm), out in zip(notes, outs, strict=True)]

    def _record(self, penalty: OrthogonalityPenalty, stacks: Sequence[Stack], flat: Tensor) -> None:
        shared, current = _shared(flat.device), torch.cuda.current_stream(flat.device)
        # Not in the pool: there other graphs may write in between, for norms are read after the backward pass
        outs = [torch.empty(len(stack.shapes), device=flat.device) for stack in stacks if stack.numel]
        graph = torch.cuda.CUDAGraph()
        shared.stream.wait_stream(current)
        with torch.cuda.stream(shared.stream):
            # other threads (collectives' watchdogs) may go on as they like
            graph.capture_begin(pool=shared.pool, capture_error_mode="thread_local")
            try:
                self._notes = self._run(penalty, stacks, flat, outs)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # says only that the recording is broken
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(shared.stream)
        self._graph = graph


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

    def scratch(self, like: Tensor, numel: int) -> Tensor:
        """Memory for one bank's gradients, the same for all who ask for the same; gone with the last of them."""
        key = (numel, like.dtype)
        found = self._scratches.get(key)
        if found is None:
            found = like.new_empty(numel)
            self._scratches[key] = found
        return found


@functools.cache
def _shared(device: torch.device) -> _Shared:
    return _Shared(device)
