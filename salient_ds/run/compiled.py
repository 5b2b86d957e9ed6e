"""Compiles decoder layers with torch.compile, and launches them as CUDA graphs where that is possible.

A decoder layer of LLaMA-7B takes the GPU 1.4 ms in the forward pass, in some eighty kernels. The host takes longer to
launch them one by one. A CUDA graph launches them all at once. PyTorch records one per layer and direction.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.adapters.packed_model import layer_of

MOST_SHAPES = 2
"""Shapes of batches that are launched as graphs. Each takes a second to record, and memory for its activations."""

MOST_COMPILATIONS = 64
"""Variants of a layer that are compiled. PyTorch stops at 8, and runs all others uncompiled."""


def compile_layers(
    adapted: AdaptedModel, may_fail: bool, activation_memory: float = 1.0, cuda_graphs: bool = False
) -> None:
    """Compile the forward pass of every adapted layer with torch.compile. Hooks stay outside of the compiled code.

    All layers share one compilation. After a compaction, ranks differ from layer to layer and become symbols. Each rank
    is a symbol of its own, even if two are equal (no duck shapes). So one more compilation serves all layers except
    the first one, whose input needs no gradient, and those with a rank of 0 or 1: each pattern of these is compiled.

    Args:
        may_fail: if the compiler fails, run layers uncompiled instead of raising.
        activation_memory: share of their activations that layers keep for the backward pass. PyTorch's partitioner
            chooses what to recompute by FLOPs per byte. The setting holds for everything that this process compiles.
        cuda_graphs: launch layers as CUDA graphs in training (:class:`GraphedForward`). The caller has asked
            :func:`graph_problem` before.
    """
    import torch._functorch.config
    from torch.fx.experimental import _config as shapes

    shapes.use_duck_shape = False
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MOST_COMPILATIONS)
    torch._functorch.config.activation_memory_budget = activation_memory
    if may_fail:
        torch._dynamo.config.suppress_errors = True
    known: set[tuple[int, ...]] = set()
    for path in layer_paths(adapted):
        layer = adapted.model.get_submodule(path)
        plain = torch.compile(layer.forward)
        layer.forward = GraphedForward(layer, plain, known) if cuda_graphs else plain
    if cuda_graphs:
        assert adapted.packed is not None
        adapted.packed.keep_addresses()
        adapted.model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())


def layer_paths(adapted: AdaptedModel) -> list[str]:
    """Paths of the decoder layers that have adapters."""
    return sorted({layer_of(name) for name in adapted.adapters} - {""})


def graph_problem(adapted: AdaptedModel, partitioned: bool) -> str | None:
    """Why the layers of this model cannot be launched as CUDA graphs, or None.

    Args:
        partitioned: ZeRO-3 gathers the base for every layer, at another address each time.
    """
    if partitioned:
        return "ZeRO-3 gathers layers at changing addresses"
    if adapted.names_in_full:
        return "modules trained in full accumulate gradients that a graph would overwrite"
    return "adapters are not packed" if adapted.packed is None else None


class GraphedForward:
    """The forward pass of a layer: a CUDA graph in training for the first shapes of a batch, else compiled code.

    A graph reads its inputs at fixed addresses and holds for one shape. Batches that are filled up to their longest
    example have many shapes, so all but the first :data:`MOST_SHAPES` run as compiled code without a graph. Batches of
    instruction data are filled up to one shape (:class:`salient_ds.data.collate.Collator`).

    Args:
        layer: the layer; its current ``forward`` is compiled a second time, for graphs.
        plain: its compiled forward pass.
        known: shapes that have graphs; all layers share the set.
    """

    def __init__(self, layer: nn.Module, plain: Callable[..., Any], known: set[tuple[int, ...]]) -> None:
        self._layer = layer
        self._plain = plain
        self._known = known
        self._graphed = torch.compile(layer.forward, options={"triton.cudagraphs": True})
        self.__signature__ = inspect.signature(layer.forward)  # transformers reads the arguments' names
        functools.update_wrapper(self, layer.forward)

    @property
    def graphs(self) -> bool:
        """Whether any shape is launched as a graph."""
        return bool(self._known)

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (self._graphed if self._suits(hidden) else self._plain)(hidden, *args, **kwargs)

    def _suits(self, hidden: Tensor) -> bool:
        if not (hidden.is_cuda and self._layer.training and torch.is_grad_enabled()):
            return False
        shape = tuple(hidden.shape)
        if shape not in self._known and len(self._known) < MOST_SHAPES:
            self._known.add(shape)
        return shape in self._known
