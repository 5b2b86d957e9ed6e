"""ZeRO-3 for the frozen base only: every process keeps a part of each layer, and layers are gathered one by one.

The base never changes, so of ZeRO-3 only the gathering is needed: no gradients, no masters, no writing back. DeepSpeed
partitions the weights while they are loaded. Then each layer becomes one flat run of bytes, and every process keeps its
part of it. One collective gathers a layer while the layer before it computes. Adapters live in banks beside the model.
They are replicated in training precision and belong to an ordinary ZeRO-2 engine, which partitions masters and moments.

Layers take turns in two buffers. Layer i always lies in buffer i mod 2, at the same place. So its parameters are views
that are made only once, and views that a compiled forward pass has saved for backward are valid again as soon as the
layer is back in its buffer. Whatever is outside the layers (embeddings, last norm, output head) stays whole on every
process.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from salient_ds.adapters.packed_model import layer_of
from salient_ds.config.run import RunConfig
from salient_ds.zero.collectives import world
from salient_ds.zero.ds_json import summary
from salient_ds.zero.frozen import PART
from salient_ds.zero.internals.layouts import full_shape
from salient_ds.zero.internals.partitioned import mark_not_available, take_whole

ADAPTER_STAGE = 2
BASE_KEYS = ("offload_param", "sub_group_size", "memory_efficient_linear")
"""Keys of ``zero_optimization`` that concern only the base, as do those that begin with ``stage3_`` or ``zero_``."""
BUFFERS = 2
REMEDY = "set speed.zero3 to partitioned, or use ZeRO stage 2"
ALIGNMENT = 256
"""Bytes. Every parameter begins at a multiple of it, as it would in memory of its own."""

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class ShardedBase:
    """The layers of a model, partitioned over processes and gathered by hooks."""

    def __init__(
        self, model: nn.Module, ds_config: dict[str, Any], device: torch.device, full: Collection[str] = ()
    ) -> None:
        """Take over ``model`` (loaded under ZeRO-3, without adapters) from DeepSpeed.

        Args:
            ds_config: resolved DeepSpeed settings of stage 3. Only ``offload_param`` is read.
            device: where layers run. This process' parts are kept there, or in CPU memory with ``offload_param``.
            full: paths of modules that will be trained in full. They stay whole on every process.

        Raises:
            ValueError: layers are skipped at random, share parameters, or hold several data types.
        """
        layers = layers_of(model)
        _refuse_what_cannot_be_sharded(model, layers)
        whole = {id(p) for path in full for p in model.get_submodule(path).parameters()}
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()} - whole
        _replace(model, [p for p in model.parameters() if id(p) not in inside], take_whole)
        whole = {id(p) for path in full for p in model.get_submodule(path).parameters()}  # they are new objects
        self._shards = [_Shard(layer, whole) for layer in layers]
        size = max((shard.whole_bytes for shard in self._shards), default=0)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(BUFFERS, len(layers)))]
        self._held: list[int | None] = [None] * BUFFERS
        """Index of the layer in each buffer, from the moment its gathering is queued."""
        self._ready: list[Any] = [None] * BUFFERS
        """CUDA event that the computation must wait for before it reads the buffer."""
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        offload = ds_config["zero_optimization"].get("offload_param", {}) if summary(ds_config).offload_param else None
        for index, (layer, shard) in enumerate(zip(layers, self._shards, strict=True)):
            shard.take(layer, self._buffers[index % BUFFERS], offload)
            layer.register_forward_pre_hook(self._before_forward(index), prepend=True)
            layer.register_forward_hook(self._after_forward(index))

    def _before_forward(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            # inside backward, a layer's forward pass is a recomputation: the layer before it comes next
            self.need(index, -1 if torch._C._current_graph_task_id() != -1 else 1)

        return hook

    def _after_forward(self, index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            # The first tensor is the hidden state. Its gradient is known once backward has left the next layer
            tensors = [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf) and leaf.requires_grad]
            if tensors:
                tensors[0].register_hook(lambda grad: self.need(index, -1))
            elif torch.is_grad_enabled() and any(torch.is_tensor(x) and x.requires_grad for x in tree_leaves(inputs)):
                raise ValueError(
                    f"{type(module).__name__} returns {type(output).__name__}, in which no tensor was found whose "
                    f"gradient would announce the layer's backward pass: {REMEDY}"
                )

        return hook

    @torch.no_grad()
    def need(self, index: int, direction: int) -> None:
        """Bring layer ``index`` into its buffer, and begin to gather the next one in ``direction`` (1 or -1)."""
        if self._held[index % BUFFERS] != index:
            self._gather(index)
        if self._stream is not None and self._ready[index % BUFFERS] is not None:
            torch.cuda.current_stream().wait_event(self._ready[index % BUFFERS])
            self._ready[index % BUFFERS] = None
        following = index + direction
        if 0 <= following < len(self._shards) and self._held[following % BUFFERS] != following:
            self._gather(following)

    def _gather(self, index: int) -> None:
        slot = index % BUFFERS
        self._held[slot] = index
        if self._stream is None:
            self._shards[index].gather(self._buffers[slot])
            return
        # Safe to overwrite after this wait: everything that reads the buffer's former layer has been queued by now. A
        # layer is asked for when the one before it is done, and in backward autograd runs later operations first
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            self._shards[index].gather(self._buffers[slot])
            self._ready[slot] = self._stream.record_event()


class _Shard:
    """The layout of one layer as a flat run of bytes, and this process' part of it."""

    def __init__(self, layer: nn.Module, whole: Collection[int]) -> None:
        """
        Args:
            whole: ids of the parameters that are left out, because they stay whole on every process.
        """
        global_rank, world_size = world()
        self._whole = whole
        parameters = self._sharded(layer)
        self._shapes = [full_shape(p) for p in parameters]
        self._sizes = [math.prod(s) * p.element_size() for s, p in zip(self._shapes, parameters, strict=True)]
        self._offsets = [0]
        for size in self._sizes:
            self._offsets.append(self._offsets[-1] + math.ceil(size / ALIGNMENT) * ALIGNMENT)
        self._part_bytes = math.ceil(self._offsets[-1] / world_size / ALIGNMENT) * ALIGNMENT
        self.whole_bytes = self._part_bytes * world_size
        self._begin = global_rank * self._part_bytes
        self._part = torch.zeros(0, dtype=torch.uint8)

    def _sharded(self, layer: nn.Module) -> list[nn.Parameter]:
        return [parameter for parameter in layer.parameters() if id(parameter) not in self._whole]

    def take(self, layer: nn.Module, buffer: Tensor, offload: dict[str, Any] | None) -> None:
        """Keep this process' part of the layer, and make the layer's parameters views of ``buffer``.

        Args:
            offload: section ``offload_param``, to keep the part in CPU memory; None: keep it on the buffer's device.
        """
        home = buffer.device if offload is None else torch.device("cpu")
        pinned = offload is not None and buffer.device.type == "cuda" and bool(offload.get("pin_memory", False))
        self._part = torch.zeros(self._part_bytes, dtype=torch.uint8, device=home, pin_memory=pinned)
        parameters = self._sharded(layer)
        where = {id(parameter): index for index, parameter in enumerate(parameters)}

        def view(old: nn.Parameter) -> Tensor:
            index = where[id(old)]
            begin, size = self._offsets[index], self._sizes[index]
            self._keep(take_whole(old).view(-1).view(torch.uint8), begin)
            # .data: when gathering writes the buffer, autograd must not take saved tensors for modified ones
            return buffer[begin : begin + size].data.view(old.dtype).view(self._shapes[index])

        _replace(layer, parameters, view)
        setattr(layer, PART, lambda: (self._part, {id(parameter) for parameter in self._sharded(layer)}))
        for parameter in self._sharded(layer):
            mark_not_available(parameter)  # so that an engine over the model does not broadcast the buffers

    def _keep(self, whole: Tensor, offset: int) -> None:
        """Copy the bytes that this process keeps of a parameter, which begins at byte ``offset`` of the layer."""
        first, last = max(offset, self._begin), min(offset + len(whole), self._begin + self._part_bytes)
        if first < last:
            self._part[first - self._begin : last - self._begin] = whole[first - offset : last - offset]

    def gather(self, buffer: Tensor) -> None:
        """Fill ``buffer`` with the whole layer."""
        whole = buffer[: self.whole_bytes]
        if world().world_size == 1:
            whole.copy_(self._part, non_blocking=True)
            return
        part = self._part
        if part.device != whole.device:
            part = whole[self._begin : self._begin + len(part)]
            part.copy_(self._part, non_blocking=True)
        _all_gather(whole, part)


def _refuse_what_cannot_be_sharded(model: nn.Module, layers: list[nn.Module]) -> None:
    config: Any = getattr(model, "config", None)
    for name in ("layerdrop", "encoder_layerdrop", "decoder_layerdrop"):
        rate = getattr(config, name, 0) or 0
        if rate > 0:  # processes would gather different layers at the same time
            raise ValueError(f"the model's {name}={rate:g} skips layers, which a sharded base cannot do: {REMEDY}")
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ValueError(f"some of the model's {len(layers)} layers share parameters: {REMEDY}")
    found = sorted({str(parameter.dtype) for parameter in parameters})
    if len(found) > 1:  # an engine would cast some of them, and with that take them out of the buffers
        raise ValueError(f"the model's layers hold parameters of several types ({', '.join(found)}): {REMEDY}")


def _replace(module: nn.Module, parameters: list[nn.Parameter], tensor_for: Any) -> None:
    """Replace each of ``parameters`` by a frozen one over ``tensor_for(old)``, wherever the module uses it."""
    new = {id(p): nn.Parameter(tensor_for(p), requires_grad=False) for p in parameters}
    for child in module.modules():
        for name, old in child._parameters.items():
            if old is not None and id(old) in new:
                child._parameters[name] = new[id(old)]


def effective_config(ds_config: dict[str, Any], config: RunConfig, processes: int) -> dict[str, Any]:
    """The DeepSpeed settings that the run really uses; different from ``ds_config`` only for a sharded base.

    On a single process without parameter offload there is nothing to partition: the settings become those of stage 2,
    and the base stays whole. Everything else, checkpoints included, is the same.

    Otherwise ``memory_efficient_linear`` is switched off. It makes DeepSpeed replace ``torch.nn.functional.linear`` in
    the whole process, which helps only weights that DeepSpeed gathers.
    """
    zero = summary(ds_config)
    if not config.speed_plan(zero.stage).sharded_base:
        return ds_config
    if processes == 1 and not zero.offload_param:
        return adapter_config(ds_config)
    return ds_config | {"zero_optimization": ds_config["zero_optimization"] | {"memory_efficient_linear": False}}


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that are gathered as a whole, in the model's order: the elements of its module lists."""
    paths = dict.fromkeys(layer_of(path) for path, _ in model.named_modules())
    return [model.get_submodule(path) for path in paths if path]


def adapter_config(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Settings of the engine that owns the adapters: ``ds_config`` at stage 2, without the keys that concern the base.

    ``overlap_comm`` is switched off. With it, DeepSpeed waits for the device at every bucket, and meanwhile the next
    layers of the base are not requested. Without it a step takes 0.165 s instead of 0.177 s (two H200, r=64).
    """
    own = copy.deepcopy(ds_config)
    zero = own["zero_optimization"]
    for key in [k for k in zero if k in BASE_KEYS or k.startswith(("stage3_", "zero_"))]:
        del zero[key]
    zero["stage"], zero["overlap_comm"] = ADAPTER_STAGE, False
    return own
