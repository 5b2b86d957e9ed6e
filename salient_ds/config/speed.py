"""Section ``speed`` of a run file: how parameters are stored and which kernels compute. Imports no torch.

These choices change no result beyond rounding, with one exception: see ``compaction``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from salient_ds.config.train import TrainConfig
from salient_ds.methods.options import MethodConfig
from salient_ds.methods.table import methods
from salient_ds.strict import Strict


class SpeedConfig(Strict):
    """Section ``speed`` of a run file. Every default is the choice that measured fastest where it works."""

    packing: Literal["auto", "layer", "none"] = "auto"
    """Store the adapter factors of four decoder layers in two flat parameters (singular values, everything else)
    instead of one parameter per factor. This saves host time in every step. layer: pack, or refuse the run if that is
    impossible. none: do not pack. auto: pack, unless the method does not support it, adapter.shortcuts is set, or
    ZeRO-3 partitions the adapters (`zero3: partitioned`)."""
    zero3: Literal["auto", "sharded_base", "partitioned"] = "auto"
    """What ZeRO stage 3 partitions; other stages ignore this option. sharded_base: only the layers of the frozen base,
    which are gathered one after the other. The adapters are replicated in training precision; their fp32 masters and
    Adam moments are partitioned. partitioned: base and adapters, as plain DeepSpeed does. auto: sharded_base if the
    adapters are packed (see `packing`), else partitioned."""
    compaction: Literal["auto", "none", "last", "every"] = "auto"
    """When to drop pruned rows from parameters, fp32 masters and Adam moments. none: never. last: after the last
    allocation event. every: after every event; of the built-in methods only salientlora allows it, with its default
    options. auto: last if the adapters are packed and pruned rows no longer affect the training, else none. So auto is
    last for salientlora with its default options, and for increlora, where it drops rows that were allocated but never
    activated. With adalora and lora2, pruned rows still count in the orthogonality penalty: there auto is none, and
    last changes the training."""
    compaction_multiple: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """After a compaction, round the rank of every matrix up to a multiple of this number, because GPUs multiply
    matrices of other sizes slowly. Example: with 8, a matrix with 13 live rows keeps 16; the 3 extra rows stay masked.
    A matrix is not rounded if it has no live row, or too few rows to reach the multiple. The room that increlora makes
    in flight is rounded up too, but not above adapter.rank. 1: no rounding. auto: 8 on a GPU, 1 elsewhere."""
    growth: Literal["auto", "in_flight", "preallocated"] = "auto"
    """When the rows of increlora are allocated. in_flight: every matrix starts with room for a few rows. Before an
    event that needs more, all matrices get more room; the DeepSpeed engine is rebuilt each time, as after a compaction.
    preallocated: all adapter.rank rows exist from the start. auto: in_flight if the adapters are packed, else
    preallocated."""
    compile_layers: bool | Literal["auto"] = "auto"
    """Compile every decoder layer with torch.compile. Elementwise kernels are fused, so that there are fewer of them;
    start-up takes a minute longer. Does not work with `zero3: partitioned`. auto: compile on a GPU if the adapters are
    packed, the method is not increlora (nor heterolora with synflow), and `liger` is not all. If the compiler fails
    under auto, layers run uncompiled, with a warning."""
    cuda_graphs: bool = False
    """Launch every compiled layer as a CUDA graph in training, so that steps do not wait for the host. Batches of
    instruction data are then filled up to `data.max_length`, because a graph has one shape: use it with `data.packing`,
    which leaves little to fill. (Other batches have graphs for their first two shapes.) Not at ZeRO-3, and not with
    modules trained in full."""
    fused_statistics: bool = True
    """Update the statistics of adalora and lora2 with one Triton kernel on CUDA devices: 24 instead of 80 bytes of
    memory traffic per adapter parameter and step. Equal to rounding. Without Triton, which PyTorch's builds for GPUs
    bring, and for other methods and devices it has no effect."""
    flat_gradients: bool = True
    """Convert gradients to fp32 while they are flattened for the optimizer (ZeRO-1 and 2, bf16 and fp16, without
    offload). It saves 2 bytes per adapter parameter at the step, and changes no value."""
    packed_attention: Literal["mask", "varlen"] = "mask"
    """How packed examples (`data.packing`) are kept apart. mask: transformers' dense masks. varlen: a kernel for
    segments of different lengths on GPUs, flash_attn's or PyTorch's, in bf16 and fp16 and for decoders that are known
    (models/varlen_attention.py); elsewhere masks. Equal to rounding on CPUs; on GPUs see docs/speed.md."""
    target_head: bool = False
    """Compute output layer and loss at target positions only, without ever storing the logits of more than 1,024 of
    them. Answers are often 10 to 30 % of the tokens. Only models whose head is known do so (models/target_head.py);
    others ignore it. The loss is the same to rounding. Not together with `liger`, which has a loss of its own."""
    liger: Literal["none", "loss", "all"] = "none"
    """Use the Triton kernels of liger-kernel, an optional dependency (pip install 'salient-ds[liger]'). They need a
    CUDA device. none: do not use them. loss: compute output layer and cross-entropy together, so that the full logits
    (tokens x vocabulary) are never stored. all: loss, and kernels for norms, rotary embeddings and gated activations,
    instead of compile_layers."""


@dataclass(frozen=True)
class SpeedPlan:
    """Section ``speed`` with every "auto" resolved that depends on the configuration alone."""

    packed: bool
    """Adapter factors are packed into banks of a few layers."""
    sharded_base: bool
    """ZeRO-3 partitions only the frozen base."""
    grows_in_flight: bool
    """Matrices get room for new rows during training, when they need it."""


def speed_plan(speed: SpeedConfig, method: MethodConfig, stage: int, shortcuts: bool = False) -> SpeedPlan:
    """Resolve every "auto" that depends on the configuration alone.

    Args:
        stage: ZeRO stage.
        shortcuts: whether ``adapter.shortcuts`` is set.
    """
    together = stage < 3 or speed.zero3 != "partitioned"
    packed = speed.packing != "none" and method.packable and not shortcuts and together
    return SpeedPlan(
        packed=packed,
        sharded_base=packed and stage == 3,
        grows_in_flight=packed and method.grows and speed.growth != "preallocated",
    )


def compiles(speed: SpeedConfig, method: MethodConfig, packed: bool, on_gpu: bool) -> bool:
    """Whether decoder layers are compiled with torch.compile."""
    if speed.compile_layers == "auto":
        fixed = method.compilable and method.replaces_weights is None
        return on_gpu and packed and fixed and speed.liger != "all"
    return speed.compile_layers


def activation_problems(train: TrainConfig, speed: SpeedConfig, method: MethodConfig) -> list[str]:
    """Conflicts of ``train.activation_memory`` and ``train.activation_checkpointing``, one sentence each."""
    share, other = train.activation_memory, train.activation_checkpointing
    if speed.cuda_graphs and other != "none":
        return [
            f"speed.cuda_graphs=true and train.activation_checkpointing={other}: layers that are recomputed in the "
            "backward pass cannot be graphs, use train.activation_memory, or set one of them back"
        ]
    if share == 1:
        return []
    if other != "none":
        return [f"train.activation_memory={share} and train.activation_checkpointing={other} both recompute: use one"]
    if compiles(speed, method, packed=True, on_gpu=True):
        return []
    return [
        f"train.activation_memory={share} needs compiled layers, which speed.compile_layers={speed.compile_layers}, "
        f"method {method.name} and speed.liger={speed.liger} rule out: set speed.compile_layers=true, or use "
        "train.activation_checkpointing"
    ]


def row_multiple(speed: SpeedConfig, on_gpu: bool) -> int:
    """The number to whose multiples compacted ranks are rounded up."""
    if speed.compaction_multiple == "auto":
        return 8 if on_gpu else 1
    return speed.compaction_multiple


def _graph_problems(speed: SpeedConfig, method: MethodConfig, packed: bool, stage: int) -> list[str]:
    """Conflicts of ``speed.cuda_graphs``: at most one sentence."""
    if not speed.cuda_graphs:
        return []
    if stage == 3:
        return [
            "speed.cuda_graphs=true does not work at ZeRO-3, which gathers layers at changing addresses: use stage 2"
        ]
    if not packed:
        return ["speed.cuda_graphs=true needs packed adapters: set it to false, or use packing: auto"]
    if not compiles(speed, method, packed, on_gpu=True):
        return [
            f"speed.cuda_graphs=true launches compiled layers, which speed.compile_layers={speed.compile_layers}, "
            f"method {method.name} and speed.liger={speed.liger} rule out: set it to false, or use compile_layers: true"
        ]
    return []


def replaced_weights_problems(speed: SpeedConfig, method: MethodConfig) -> list[str]:
    """Conflicts with a method that replaces weights while the model runs, one sentence each."""
    option = method.replaces_weights
    if option is None:
        return []
    problems = []
    if speed.compile_layers is True:
        problems.append(
            f"{option} replaces weights while the model runs, which compiled layers would not see: set "
            "speed.compile_layers to false, or choose another proxy"
        )
    if speed.liger == "all":
        problems.append(
            f"{option} replaces weights while the model runs, which the norms of speed.liger=all would not see: use "
            "liger: loss, or choose another proxy"
        )
    return problems


def speed_problems(speed: SpeedConfig, method: MethodConfig, stage: int, shortcuts: bool = False) -> list[str]:
    """Contradictions among the choices, one sentence each with value and remedy."""
    plan = speed_plan(speed, method, stage, shortcuts)
    packed, partitioned = plan.packed, stage == 3 and not plan.sharded_base
    problems = _graph_problems(speed, method, packed, stage)
    if speed.packing == "layer" and not packed:
        apart = method.packable and not shortcuts
        why = "zero3: partitioned keeps adapters apart" if apart else f"not with {method.name}"
        problems.append(f"speed.packing=layer cannot be had ({why}): use auto")
    if speed.zero3 == "sharded_base" and stage == 3 and not packed:
        problems.append(
            f"speed.zero3=sharded_base needs packed adapters, which method {method.name} or "
            f"speed.packing={speed.packing} rules out: use partitioned"
        )
    if speed.compaction in ("last", "every") and not packed:
        problems.append(f"speed.compaction={speed.compaction} needs packed adapters: use none, or packing: auto")
    if speed.compaction == "every" and method.compactable != "every":
        others = [name for name, options in methods().items() if options.compactable == "every"]
        instead = "last" if method.compactable == "last" else "none"
        problems.append(f"speed.compaction=every works with {', '.join(others)}, not with {method.name}: use {instead}")
    if speed.compaction == "last" and method.compactable == "never":
        problems.append(f"speed.compaction=last cannot be had with {method.name}, which drops no rows: use none")
    if speed.growth == "in_flight" and not plan.grows_in_flight:
        why = "needs packed adapters" if method.grows else f"works with methods that add rows, not with {method.name}"
        problems.append(f"speed.growth=in_flight {why}: use auto")
    if speed.compile_layers is True and partitioned:
        problems.append(
            "speed.compile_layers does not work where ZeRO-3 partitions adapters too (zero3: partitioned): set it to "
            "false, or use stage 2"
        )
    if speed.liger != "none" and partitioned:
        problems.append(
            f"speed.liger={speed.liger} reads the output layer's weight, which ZeRO-3 partitions here: use none, "
            "stage 2, or zero3: sharded_base where the method allows it"
        )
    if speed.liger != "none" and speed.target_head:
        problems.append(f"speed.target_head and speed.liger={speed.liger} both replace the loss: use one of them")
    if speed.liger == "all" and speed.compile_layers is True:
        problems.append("speed.liger=all: layers compiled by speed.compile_layers fuse these already, use liger: loss")
    if speed.liger == "all" and shortcuts:
        # liger's norms overwrite the gradient of their output, which a shortcut may share with another branch
        problems.append("speed.liger=all does not work with adapter.shortcuts: use liger: loss")
    return problems


def speed_notes(
    speed: SpeedConfig, method: MethodConfig, stage: int, shortcuts: bool, events: bool, packed: bool = True
) -> list[str]:
    """Optimisations that the run goes without because of its method, shortcuts or data, one sentence each.

    Args:
        events: whether the run has allocation events (without any there are no rows to drop).
        packed: whether rows are filled with several examples (``data.packing``).
    """
    notes = []
    if speed.cuda_graphs and not packed:
        notes.append(
            "speed.cuda_graphs fills every row up to data.max_length, and without data.packing most of that may be "
            "padding: set data.packing=true"
        )
    if speed.packing == "auto" and not method.packable:
        notes.append(
            f"method {method.name} does not declare packing: every factor is a parameter of its own, which costs host "
            "time, and rules out compaction and ZeRO-3's sharded base"
        )
    elif speed.packing == "auto" and shortcuts:
        notes.append("adapter.shortcuts rules out packing: every factor is a parameter of its own")
    elif events and method.compactable == "never" and speed.compaction == "auto":
        notes.append(f"method {method.name} does not declare compaction: pruned rows stay allocated to the end")
    if speed.compile_layers == "auto" and not method.compilable:
        notes.append(
            f"method {method.name} does not declare compilation: layers run uncompiled on GPUs unless "
            "speed.compile_layers=true"
        )
    return notes
