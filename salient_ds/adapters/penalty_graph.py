"""The penalty's gradient for one bank as a CUDA graph.

The gradient takes some sixty small kernels per layer. They keep the GPU busy for 0.3 ms but the host for more than 1 ms
(LLaMA-7B, H100), and training steps wait for the host. Their inputs have fixed addresses and rarely change shape. So
the kernels are captured once and then launched as one graph.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from salient_ds.adapters.orthogonality import OrthogonalityPenalty


class Stacked(Protocol):
    """Factors whose penalty is computed together."""

    def add_gradient(self, penalty: OrthogonalityPenalty, flat: Tensor, grad: Tensor, accumulate: bool) -> None:
        """Add its gradient to ``grad``, or with ``accumulate=False`` overwrite it, and note the norms."""
        ...


class PenaltyGraph:
    """Adds the penalty's gradients for the factors in one flat parameter.

    New values of the factors need no new graph. If masks, coefficient, gradient scale, address or size change, the
    graph is captured again.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._graph: torch.cuda.CUDAGraph | None = None
        self._scratch = self._extra = torch.zeros(0)
        self._notes: list[tuple[Tensor, int, Tensor]] = []

    @property
    def captured(self) -> bool:
        """Whether there is a graph."""
        return self._graph is not None

    def add(
        self,
        penalty: OrthogonalityPenalty,
        stacks: Sequence[Stacked],
        version: int,
        flat: Tensor,
        grad: Tensor,
        largest: int,
    ) -> None:
        """Add to ``grad`` in place and record the norms, like calling ``add_gradient`` of every stack.

        Args:
            version: increases with every change of the stacks' masks.
            flat: the parameter that holds the factors.
            largest: elements of the largest such parameter of the model; all share scratch memory of that size.
        """
        key = (version, penalty.coefficient, penalty.gradient_scale, flat.data_ptr(), flat.numel())
        if key != self._key:
            # The first run is not captured: it loads the kernels, which must not happen during a capture
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
        self, penalty: OrthogonalityPenalty, stacks: Sequence[Stacked], flat: Tensor, outs: list[Tensor] | None
    ) -> list[tuple[Tensor, int, Tensor]]:
        """Fill the scratch memory. Returns the norms, written into ``outs`` if given."""
        with penalty.collect_notes() as notes:
            for stack in stacks:
                stack.add_gradient(penalty, flat, self._extra, accumulate=False)
        if outs is None:
            return notes
        return [(slots, term, out.copy_(norm)) for (slots, term, norm), out in zip(notes, outs, strict=True)]

    def _record(self, penalty: OrthogonalityPenalty, stacks: Sequence[Stacked], flat: Tensor) -> None:
        shared, current = _shared(flat.device), torch.cuda.current_stream(flat.device)
        # Not from the pool: norms are read after the backward pass, and other graphs may overwrite pool memory before
        outs = [torch.empty_like(norms) for _, _, norms in self._notes]
        graph = torch.cuda.CUDAGraph()
        shared.stream.wait_stream(current)
        with torch.cuda.stream(shared.stream):
            # thread_local: other threads (watchdogs of collectives) may use CUDA meanwhile
            graph.capture_begin(pool=shared.pool, capture_error_mode="thread_local")
            try:
                self._notes = self._run(penalty, stacks, flat, outs)
            except BaseException:
                with contextlib.suppress(RuntimeError):  # only says that the capture is invalid
                    graph.capture_end()
                raise
            graph.capture_end()
        current.wait_stream(shared.stream)
        self._graph = graph


class _Shared:
    """What all graphs of a device share. The graphs are launched one after another on one stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._scratches: weakref.WeakValueDictionary[Any, Tensor] = weakref.WeakValueDictionary()
        self._anchor = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self.stream):
            square = torch.ones(16, 16, device=device)
            torch.mm(square, square)  # allocates the stream's workspace, outside any capture
            # A pool must not lose its last graph while memory from it is in use
            self._anchor.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            square.add_(1)
            self._anchor.capture_end()

    def scratch(self, like: Tensor, numel: int) -> Tensor:
        """Scratch memory for one bank's gradients. Equal requests share it; it is freed with its last user."""
        key = (numel, like.dtype)
        found = self._scratches.get(key)
        if found is None:
            found = like.new_empty(numel)
            self._scratches[key] = found
        return found


@functools.cache
def _shared(device: torch.device) -> _Shared:
    return _Shared(device)
