"""Where DeepSpeed 0.19 keeps the fp32 masters of each parameter.

A *buffer* is a tensor that the basic torch optimizer steps. A *fragment* says which elements of a parameter lie where
in a buffer on this process. There is one reader per optimizer wrapper. :func:`read_layout` picks it. For a wrapper that
it does not know it raises an error with its name, so that a new DeepSpeed fails loudly instead of silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed.comm as dist
from torch import Tensor, nn

from salient_ds.zero.internals.contract import require


@dataclass(frozen=True)
class Fragment:
    """Elements [lo, lo + numel) of ``parameter`` (flattened, unpadded) = buffer[off : off + numel]."""

    name: str
    parameter: nn.Parameter
    lo: int
    numel: int
    buffer: int
    off: int


@dataclass(frozen=True)
class BufferLayout:
    buffers: list[Tensor]
    """fp32 tensors; they are the keys of the basic optimizer's state."""
    fragments: list[Fragment]
    replicated: bool
    """Every process owns all elements (ZeRO-0), so that the statistics of one process are already global."""


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, even if ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def full_numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def read_layout(engine: Any) -> BufferLayout:
    """The buffers of this process, and the fragments of all trainable parameters in them.

    Raises:
        RuntimeError: the optimizer wrapper is unknown, or lacks an attribute that is read here.
    """
    optimizer = engine.optimizer
    require(engine)
    names = {id(p): n for n, p in engine.module.named_parameters() if p.requires_grad and full_numel(p) > 0}
    kind = type(optimizer).__name__
    if kind == "DeepSpeedZeroOptimizer":
        return BufferLayout(list(optimizer.single_partition_of_fp32_groups), list(_stage_1_2(optimizer, names)), False)
    if kind == "DeepSpeedZeroOptimizer_Stage3":
        return BufferLayout(list(optimizer.fp32_partitioned_groups_flat), list(_stage_3(engine, names)), False)
    if kind == "BF16_Optimizer":
        return BufferLayout(list(optimizer.fp32_groups_flat_partition), list(_bf16(engine, names)), False)
    if kind == "FP16_UnfusedOptimizer":
        return _unfused(optimizer, names)
    if kind == "FP16_Optimizer":
        return _fused(optimizer, names)
    if optimizer is engine.basic_optimizer:
        return _plain(optimizer, names)
    raise RuntimeError(
        f"DeepSpeed's optimizer wrapper {kind} is not known to salient_ds: use the versions that pyproject.toml names, "
        "and a ZeRO JSON without the features that `salient-ds check` refuses"
    )


def _stage_1_2(optimizer: Any, names: dict[int, str]) -> Iterator[Fragment]:
    # Not parameter._hp_mapping: it ignores the order that round_robin_gradients gives the flat buffer.
    groups = zip(optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True)
    for index, (parameters, offsets) in enumerate(groups):
        size = int(optimizer.partition_size[index])
        start = size * dist.get_rank(group=optimizer.real_dp_process_group[index])
        for parameter, offset in zip(parameters, offsets, strict=True):
            first, last = max(offset, start), min(offset + parameter.numel(), start + size)
            if first < last and id(parameter) in names:
                name = names[id(parameter)]
                yield Fragment(name, parameter, first - offset, last - first, index, first - start)


def _stage_3(engine: Any, names: dict[int, str]) -> Iterator[Fragment]:
    optimizer = engine.optimizer
    for parameter in engine.module.parameters():
        if id(parameter) not in names:
            continue
        # The last partition ends in uninitialised padding: never read beyond ds_numel.
        buffer, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        lo = size * dist.get_rank(group=parameter.ds_process_group)
        numel = max(0, min(size, parameter.ds_numel - lo))
        if numel:
            yield Fragment(names[id(parameter)], parameter, lo, numel, buffer, offset)


def _bf16(engine: Any, names: dict[int, str]) -> Iterator[Fragment]:
    for parameter in engine.module.parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if id(parameter) in names and mapping is not None:
            source, target = mapping.lp_fragment_address, mapping.hp_fragment_address
            name = names[id(parameter)]
            yield Fragment(name, parameter, source.start, source.numel, mapping.param_group_index, target.start)


def _unfused(optimizer: Any, names: dict[int, str]) -> BufferLayout:
    buffers: list[Tensor] = []
    fragments = []
    for masters, parameters in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        for master, parameter in zip(masters, parameters, strict=True):
            fragments.append(Fragment(names[id(parameter)], parameter, 0, parameter.numel(), len(buffers), 0))
            buffers.append(master)
    return BufferLayout(buffers, fragments, True)


def _fused(optimizer: Any, names: dict[int, str]) -> BufferLayout:
    fragments = []
    for index, parameters in enumerate(optimizer.fp16_groups):
        offset = 0
        for parameter in parameters:
            fragments.append(Fragment(names[id(parameter)], parameter, 0, parameter.numel(), index, offset))
            offset += parameter.numel()
    return BufferLayout(list(optimizer.fp32_groups_flat), fragments, True)


def _plain(optimizer: Any, names: dict[int, str]) -> BufferLayout:
    buffers = [p for group in optimizer.param_groups for p in group["params"] if id(p) in names]
    fragments = [Fragment(names[id(p)], p, 0, p.numel(), i, 0) for i, p in enumerate(buffers)]
    return BufferLayout(list(buffers), fragments, True)


def copies(parameter: Any) -> Iterator[tuple[Tensor, int]]:
    """The training-precision copies of ``parameter`` on this process as (flat tensor, first element) pairs.

    Under ZeRO-3 these are the partition and, while it is gathered or persistent, the full tensor. Otherwise it is the
    parameter itself.
    """
    if hasattr(parameter, "ds_tensor"):
        part = parameter.ds_tensor
        lo = part.numel() * dist.get_rank(group=parameter.ds_process_group)
        numel = max(0, min(part.numel(), int(parameter.ds_numel) - lo))
        if numel:
            yield part.data.view(-1)[:numel], lo
        if parameter.ds_status.name == "AVAILABLE":
            yield parameter.data.view(-1), 0
    else:
        yield parameter.data.view(-1), 0
