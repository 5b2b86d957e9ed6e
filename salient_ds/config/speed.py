"""How a run is laid out for speed: choices that change no result beyond rounding. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from salient_ds.methods.options import MethodConfig
from salient_ds.methods.table import methods
from salient_ds.strict import Strict


class SpeedConfig(Strict):
    """Section ``speed`` of a run. Every default is the one that measured fastest where it works."""

    packing: Literal["auto", "layer", "none"] = "auto"
    """Keep the adapters' factors as two flat parameters per few layers instead of one parameter each. auto: wherever
    adapters are not partitioned themselves (`zero3: partitioned`) and the method allows it."""
    zero3: Literal["auto", "sharded_base", "partitioned"] = "auto"
    """What ZeRO-3 partitions. sharded_base: the frozen base only, gathered layer by layer; adapters are replicated in
    training precision, their masters and moments partitioned. partitioned: adapters too, as plain DeepSpeed does.
    auto: sharded_base, unless the method or packing rules it out."""
    compaction: Literal["auto", "none", "last", "every"] = "auto"
    """Drop pruned rows from parameters, masters and moments: after the last event, after every one, or never. auto:
    after the last one, if the method's pruned rows have no effect any more (salientlora with its default options), and
    what is left of increlora's room."""
    compaction_multiple: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """A compaction leaves matrices with live rows pruned ones too, without effect, up to a multiple of so many if there
    are that many: matrix products of other sizes are slow on GPUs. increlora's matrices get room in such multiples. 1:
    neither. auto: 8 on a GPU, 1 elsewhere."""
    growth: Literal["auto", "in_flight", "preallocated"] = "auto"
    """When increlora's rows come into being. in_flight: with little room to spare, before events that need more of it
    (the engine is made anew each time, as by compaction). preallocated: all of adapter.rank from the start. auto:
    in_flight, wherever adapters are packed."""
    compile_layers: bool | Literal["auto"] = "auto"
    """Compile every decoder layer with torch.compile: fewer and fused elementwise kernels, a minute of start-up. Not
    with `zero3: partitioned`. auto: on a GPU, with packed salientlora, adalora and lora; if the compiler fails, layers
    run as they are, with a warning."""
    liger: Literal["none", "loss", "all"] = "none"
    """Kernels of liger-kernel, an extra (pip install 'salient-ds[liger]'), on CUDA devices. loss: output layer and
    cross-entropy in one, so that logits (tokens x vocabulary) are never stored as a whole. all: norms, rotary embedding
    and gated activations too, instead of compile_layers."""


@dataclass(frozen=True)
class SpeedPlan:
    """What section ``speed`` comes to in a run."""

    packed: bool
    """Factors lie in banks."""
    sharded_base: bool
    """ZeRO-3 partitions the frozen base alone."""
    grows_in_flight: bool
    """Matrices get room for new rows when they need it."""


def speed_plan(speed: SpeedConfig, method: MethodConfig, stage: int, shortcuts: bool = False) -> SpeedPlan:
    """Resolve everything that is ``auto``, as far as it depends on nothing but the configuration."""
    together = stage < 3 or speed.zero3 != "partitioned"
    packed = speed.packing != "none" and method.packable and not shortcuts and together
    return SpeedPlan(
        packed=packed,
        sharded_base=packed and stage == 3,
        grows_in_flight=packed and method.grows and speed.growth != "preallocated",
    )


def compiles(speed: SpeedConfig, method: MethodConfig, packed: bool, on_gpu: bool) -> bool:
    """Whether decoder layers are compiled."""
    if speed.compile_layers == "auto":
        return on_gpu and packed and method.compilable and speed.liger != "all"
    return speed.compile_layers


def row_multiple(speed: SpeedConfig, on_gpu: bool) -> int:
    """What compacted ranks are multiples of."""
    if speed.compaction_multiple == "auto":
        return 8 if on_gpu else 1
    return speed.compaction_multiple


def replaced_weights_problems(speed: SpeedConfig, method: MethodConfig) -> list[str]:
    """What does not see that a method replaces weights while the model runs."""
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
    problems = []
    plan = speed_plan(speed, method, stage, shortcuts)
    packed, partitioned = plan.packed, stage == 3 and not plan.sharded_base
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
    if speed.liger == "all" and speed.compile_layers is True:
        problems.append("speed.liger=all: layers compiled by speed.compile_layers fuse these already, use liger: loss")
    if speed.liger == "all" and shortcuts:
        # its norms overwrite the gradient of their output, which a shortcut may share with another branch
        problems.append("speed.liger=all does not work with adapter.shortcuts: use liger: loss")
    return problems


def speed_notes(speed: SpeedConfig, method: MethodConfig, stage: int, shortcuts: bool, events: bool) -> list[str]:
    """What the run goes without because its method or its shortcuts do not allow it, one sentence each.

    Args:
        events: whether the run has any, so that there are rows to drop.
    """
    notes = []
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
