"""Estimates the memory of one process, before anything is started. No torch.

Letters: c = bytes per element in training precision, W = number of processes, P = base parameters, n = trainable
parameters at the initial rank. For activations: h = hidden size, a = heads x head dimension, k = key/value width,
f = intermediate size, r = rank. A forward pass has micro-batch size x maximum length tokens. Counted, in bytes:

    base        c P, divided by W at stage 3. If only the base is sharded, parameters outside its layers stay whole.
    adapters    c n, divided by W at stage 3 unless only the base is sharded.
    optimizer   12 n / W: fp32 master and two moments. Stage 0: not divided by W, and 8 n in fp32, which needs no
                separate master.
    gradients   While the optimizer steps: c n (divided by W from stage 2 on) and an fp32 copy, 4 n / W (stage 0: not
                divided by W, and none in fp32). From stage 1 on, below fp32, also what is copied: c n / W.
    buffers     Reduction buckets (none at stage 0). At stage 3 also gathered parameters, except on a single process
                without parameter offload. If only the base is sharded: two layers. Otherwise: the most that may stay
                live plus the prefetch bucket, but not more than all parameters.
    statistics  What the method's options say, divided by W except at stage 0. The memory for an event, and for scoring
                whole matrices, is needed on every process.
    activations Per token and layer, with sdpa attention:
                    8 h + 2 c h  two fp32 copies of the input in the norms, and the norms' outputs
                    3 c a        q, attention output and its contiguous copy
                    2 c k        k and v
                    4 c f        gate, its activation, up and their product
                    2 c r        per adapter: two tensors of its rank
                Compiled layers keep c (4 h + 2 a + 2 k + 3 f) instead of the first four: norms' inputs and outputs,
                q, k, v, attention output, gate, up and their product.
                With dropout also (c + 1) x in features per adapter. With eager attention also 4 + 2 c bytes per head
                and position. The sum over all layers, plus the vocabulary term.
                If a share x of them is kept (train.activation_memory; 0 with activation checkpointing): c h and x of
                the rest per layer, plus the larger of 1 - x of one layer and the vocabulary term.
    vocabulary  Logits, their fp32 copy, log-softmax and gradient: (c + 12) x vocabulary size per token (12 x in fp32).
                With speed.liger: the gradient of the hidden states and a chunk of logits, at most 3 c h per token.
                Below stage 3, buckets come when 4 bytes x vocabulary size per token of this are free again.
    other       0.4 GiB and c n / 8: workspaces of matrix products, masks, the penalty's scratch memory for a bank.
                Peaks are then 0 to 9 % above those that were measured (tests/unit/check/test_memory.py).

IncreLoRA's n is that of adapter.rank. If room is made in flight (speed.growth), n is an upper bound instead: all growth
goes to the widest matrices, and every matrix has reserve and headroom. While room is made, masters and moments are
whole on every process for a moment (12 n), beside the copies that they replace (c n).

Not everything is alive at once. The peak is what stays (base, adapters, optimizer, statistics) plus the largest of:

    the end of the forward pass (activations, buffers, scoring, gradients of earlier micro-batches),
    the optimizer's step (gradients),
    an allocation event.

Optimizer offload moves optimizer state and fp32 gradients to the host. Parameter offload moves base and adapters; if
only the base is sharded, it moves the base's layers alone. Not counted: the CUDA context (about 0.5 GiB),
fragmentation, and what other libraries keep.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

from salient_ds.check.model_shapes import Architecture
from salient_ds.config.run import RunConfig
from salient_ds.config.speed import compiles, row_multiple
from salient_ds.methods.options import MethodConfig
from salient_ds.ranks import RankLayout
from salient_ds.zero.ds_json import DsSummary

GIB = 2**30
OTHER = 2 * GIB // 5
"""Bytes of what is in none of the formulas."""


@dataclass(frozen=True)
class Workload:
    """What one process computes, regardless of how ZeRO shards it."""

    base_parameters: int
    adapted: tuple[tuple[int, int], ...]
    """(out, in) features of every adapted layer."""
    rank: int
    trainable: int
    """n, trainable parameters (elements) at the initial rank."""
    statistics: int
    """Bytes of the method's statistics on all processes together."""
    event: int
    """Bytes that an allocation event needs on each process."""
    element_bytes: int
    """2 for bf16 and fp16, 4 for fp32."""
    tokens: int
    """Tokens per forward pass: micro batch x maximum length."""
    max_length: int
    accumulation: int
    checkpointing: bool
    compiled: bool
    """Decoder layers are compiled. On GPUs that is the default for most methods."""
    eager_attention: bool
    dropout: bool
    architecture: Architecture | None
    activation_memory: float = 1.0
    """Share of their activations that compiled layers keep."""
    scoring: int = 0
    """Bytes that each process needs during the backward pass to score whole matrices."""
    sharded_base: bool = False
    """Whether stage 3 divides the frozen base only."""
    fused_loss: bool = False
    """Whether logits exist in chunks only (speed.liger)."""
    in_flight: Workload | None = None
    """The same run with the most rows that it may have, if room is made in flight. This needs packed adapters."""

    def at(self, stage: int) -> Workload:
        """The workload that applies at a ZeRO stage."""
        packed = stage < 3 or self.sharded_base
        return self.in_flight if packed and self.in_flight is not None else self


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one process. ``peak`` is below their sum, because not everything is alive at once."""

    stage: int
    base: int
    adapters: int
    optimizer: int
    gradients: int
    buffers: int
    statistics: int
    activations: int | None
    """None if the layers of the model family in config.json are not known."""
    peak: int
    host: int
    """Bytes on the host for offloaded state (0 without offload)."""


def workload(
    run: RunConfig,
    base_parameters: int,
    layout: RankLayout,
    architecture: Architecture | None,
    world_size: int,
    in_full: int = 0,
) -> Workload:
    """The workload of a run configuration.

    Args:
        layout: all adapted modules at their initial ranks.
        in_full: parameters (elements) of the modules that are trained in full.
    """
    train, method = run.train, run.method
    work = Workload(
        base_parameters=base_parameters,
        adapted=tuple(zip(layout.out_features, layout.in_features, strict=True)),
        rank=ceil(layout.total / max(1, len(layout.ranks))),
        trainable=method.adapter_parameters(layout) + in_full,
        statistics=method.statistics_bytes(layout),
        event=method.event_bytes(layout),
        element_bytes=4 if train.precision == "fp32" else 2,
        tokens=train.micro_batch_size * run.data.max_length,
        max_length=run.data.max_length,
        accumulation=max(1, train.global_batch_size // (train.micro_batch_size * world_size)),
        checkpointing=train.activation_checkpointing == "all",
        activation_memory=train.activation_memory,
        compiled=compiles(run.speed, method, run.speed_plan(2).packed, on_gpu=True),
        eager_attention=run.model.attn_implementation == "eager",
        dropout=run.adapter.dropout > 0,
        architecture=architecture,
        scoring=method.scoring_bytes,
        sharded_base=run.speed_plan(3).sharded_base,
        fused_loss=run.speed.liger != "none",
    )
    if run.speed_plan(2).grows_in_flight:
        return replace(work, in_flight=_in_flight(work, method, layout, row_multiple(run.speed, True), in_full))
    return work


def _in_flight(work: Workload, method: MethodConfig, layout: RankLayout, multiple: int, in_full: int) -> Workload:
    rooms = method.largest_rooms(layout, multiple)
    largest = replace(layout, ranks=tuple(rooms))
    elements = method.adapter_parameters(largest) + in_full
    return replace(
        work,
        rank=ceil(sum(rooms) / len(rooms)),
        trainable=elements,
        statistics=method.statistics_bytes(largest),
        event=(12 + work.element_bytes) * elements,
    )


def estimate(work: Workload, ds: DsSummary, world_size: int) -> MemoryEstimate:
    """Apply the formulas at the top of this file to one ZeRO configuration."""
    work = work.at(ds.stage)
    c, n, stage = work.element_bytes, work.trainable, ds.stage
    shards = world_size if stage >= 1 else 1
    parameter_shards = world_size if stage == 3 else 1
    sharded = stage == 3 and work.sharded_base
    outside = _base_split(work)[0] if sharded else 0
    inside = work.base_parameters - outside
    base = c * (outside + (0 if ds.offload_param else inside // parameter_shards))
    adapters = c * n if sharded else 0 if ds.offload_param else c * n // parameter_shards
    state = (8 if stage == 0 and c == 4 else 12) * n // shards
    low_precision_grads = c * n // (world_size if stage >= 2 else 1)
    fp32_grads = 0 if stage == 0 and c == 4 else 4 * n // shards
    flat_grads = c * n // shards if stage >= 1 and c < 4 else 0
    host = (state + fp32_grads if ds.offload_optimizer else 0) + (
        c * (inside + (0 if sharded else n)) // parameter_shards if ds.offload_param else 0
    )
    optimizer = 0 if ds.offload_optimizer else state
    gradients = low_precision_grads + (0 if ds.offload_optimizer else fp32_grads + flat_grads)
    buffers = _buffers(work, ds, world_size)
    statistics = work.statistics // shards
    activations = _activations(work)

    stays = base + adapters + optimizer + statistics
    freed = min(buffers, _freed_by_loss(work)) if stage < 3 else 0
    forward = (
        buffers - freed + (activations or 0) + (low_precision_grads if work.accumulation > 1 else 0) + work.scoring
    )
    peak = stays + max(forward, gradients, work.event) + OTHER + c * n // 8
    return MemoryEstimate(
        stage=stage,
        base=base,
        adapters=adapters,
        optimizer=optimizer,
        gradients=gradients,
        buffers=buffers,
        statistics=statistics,
        activations=activations,
        peak=peak,
        host=host,
    )


def estimate_stages(work: Workload, ds: DsSummary, world_size: int) -> dict[str, MemoryEstimate]:
    """Estimates for the ZeRO files in ds_configs/, by name. All use the bucket sizes of ``ds``."""
    variants = {
        "zero0": (0, False, False), "zero1": (1, False, False), "zero2": (2, False, False),
        "zero2_offload": (2, True, False), "zero3": (3, False, False), "zero3_offload": (3, True, True),
    }  # fmt: skip
    table = {}
    for name, (stage, optimizer, parameters) in variants.items():
        variant = replace(ds, stage=stage, offload_optimizer=optimizer, offload_param=parameters)
        table[name] = estimate(work, variant, world_size)
    return table


def _buffers(work: Workload, ds: DsSummary, world_size: int) -> int:
    if ds.stage == 0:
        return 0
    sharded = ds.stage == 3 and work.sharded_base
    buckets = (2 if ds.overlap_comm and ds.stage < 3 and world_size > 1 else 1) if ds.contiguous_gradients else 0
    size = buckets * ds.reduce_bucket_size
    if sharded and (world_size > 1 or ds.offload_param):
        size += 2 * _base_split(work)[1]
    elif ds.stage == 3 and (world_size > 1 or ds.offload_param):
        everything = work.base_parameters + work.trainable
        layer = max((out * inner for out, inner in work.adapted), default=0)
        size += min(everything, max(ds.max_live_parameters, layer) + ds.prefetch_bucket_size)
    return work.element_bytes * size


def _base_split(work: Workload) -> tuple[int, int]:
    """Number of parameters outside the layers, and in one layer. Unknown models count as if all were in layers."""
    arch = work.architecture
    if arch is None:
        return 0, max((out * inner for out, inner in work.adapted), default=0)
    return max(0, work.base_parameters - arch.layers * arch.layer_parameters), arch.layer_parameters


def _activations(work: Workload) -> int | None:
    """Bytes at the end of the forward pass, where there are most activations."""
    arch = work.architecture
    if arch is None:
        return None
    c, hidden = work.element_bytes, arch.hidden_size
    attention = arch.heads * arch.head_dim
    layer = 8 * hidden + c * (2 * hidden + 3 * attention + 2 * arch.kv_width + 4 * arch.intermediate_size)
    if work.compiled:
        layer = c * (4 * hidden + 2 * attention + 2 * arch.kv_width + 3 * arch.intermediate_size)
    if work.eager_attention:
        layer += (4 + 2 * c) * arch.heads * work.max_length
    in_adapters = 2 * c * work.rank * len(work.adapted)
    if work.dropout:
        in_adapters += (c + 1) * sum(inner for _, inner in work.adapted)
    layers = arch.layers * layer + in_adapters
    vocabulary = _vocabulary(work, arch)
    kept = 0.0 if work.checkpointing else work.activation_memory
    inputs = c * hidden * arch.layers
    recomputed = (1 - kept) * (layers - inputs)
    return work.tokens * round(layers - recomputed + max(recomputed / arch.layers, vocabulary))


def _vocabulary(work: Workload, arch: Architecture) -> int:
    """Bytes per token of the output layer and the loss."""
    c, hidden = work.element_bytes, arch.hidden_size
    if work.fused_loss:  # gradient of hidden states, and a chunk of logits of the same size, rounded up to 2^k
        return c * (hidden + min(2 * hidden, arch.vocab_size))
    return (12 if c == 4 else c + 12) * arch.vocab_size


def _freed_by_loss(work: Workload) -> int:
    """Bytes of the loss that are free when its backward pass begins, and reduction buckets are allocated."""
    if work.architecture is None or work.fused_loss:
        return 0
    return work.tokens * 4 * work.architecture.vocab_size
