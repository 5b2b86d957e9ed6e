"""How a run is laid out for speed: choices that change no result beyond rounding. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class SpeedConfig(BaseModel):
    """Section ``speed`` of a run. Every default is the one that measured fastest where it works."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    packing: Literal["auto", "layer", "none"] = "auto"
    """Keep the adapters' factors as two flat parameters per layer instead of one parameter each. auto: wherever
    adapters are not partitioned themselves (`zero3: partitioned`) and the method allows it."""
    zero3: Literal["auto", "sharded_base", "partitioned"] = "auto"
    """What ZeRO-3 partitions. sharded_base: the frozen base only, gathered layer by layer; adapters are replicated in
    training precision, their masters and moments partitioned. partitioned: adapters too, as plain DeepSpeed does.
    auto: sharded_base, unless the method or packing rules it out."""
    compaction: Literal["auto", "none", "last", "every"] = "auto"
    """Drop pruned rows from parameters, masters and moments: after the last event, after every one, or never. auto:
    after the last one, if the method's pruned rows have no effect any more (salientlora with its default options)."""
    compile_layers: bool = False
    """Compile every decoder layer with torch.compile: fewer and fused elementwise kernels, a minute of start-up. Not
    with zero3: gathered parameters would stay in memory."""


PACKABLE = ("salientlora", "adalora", "lora", "lora2", "increlora")
"""Methods whose adapters may be packed."""


def packs(speed: SpeedConfig, method: str, stage: int, shortcuts: bool = False) -> bool:
    """Whether the factors of this run are packed per layer."""
    if speed.packing == "none" or method not in PACKABLE or shortcuts:
        return False
    return stage < 3 or speed.zero3 != "partitioned"


def shards_base(speed: SpeedConfig, method: str, stage: int, shortcuts: bool = False) -> bool:
    """Whether ZeRO-3 partitions the frozen base alone."""
    return stage == 3 and speed.zero3 != "partitioned" and packs(speed, method, stage, shortcuts)


def speed_problems(speed: SpeedConfig, method: str, stage: int, shortcuts: bool = False) -> list[str]:
    """Contradictions among the choices, one sentence each with value and remedy."""
    problems = []
    packed = packs(speed, method, stage, shortcuts)
    if speed.packing == "layer" and not packed:
        apart = method in PACKABLE and not shortcuts
        why = "zero3: partitioned keeps adapters apart" if apart else f"not with {method}"
        problems.append(f"speed.packing=layer cannot be had ({why}): use auto")
    if speed.zero3 == "sharded_base" and stage == 3 and not packed:
        problems.append(
            f"speed.zero3=sharded_base needs packed adapters, which method {method} or speed.packing={speed.packing} "
            "rules out: use partitioned"
        )
    if speed.compaction in ("last", "every") and not packed:
        problems.append(f"speed.compaction={speed.compaction} needs packed adapters: use none, or packing: auto")
    if speed.compaction == "every" and method != "salientlora":
        problems.append(f"speed.compaction=every works with salientlora, not with {method}: use last")
    if speed.compile_layers and stage == 3:
        problems.append("speed.compile_layers does not work with ZeRO-3: set it to false, or use stage 2")
    return problems
