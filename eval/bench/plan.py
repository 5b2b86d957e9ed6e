"""Which arms are timed: all requested combinations except those that cannot run. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from salient_ds.methods.table import methods

PEFT_ARMS = ("peft_lora", "peft_adalora")
UNSLOTH = "unsloth"
PEERS = (*PEFT_ARMS, UNSLOTH)
"""Baselines: arms of other libraries."""
PLAIN = "plain"
COMPILED, FUSED_LOSS, GRAPHS = "compile", "liger", "graphs"
"""Options of an arm, appended to its name with "+": compiled decoder layers, the fused loss of liger-kernel, and
compiled layers launched as CUDA graphs."""
SPEED: dict[str, dict[str, Any]] = {
    "unfused": {"fused_statistics": False, "flat_gradients": False},
    "targets": {"target_head": True},
    GRAPHS: {"cuda_graphs": True},
    "unpacked": {"packing": "none"},
}
"""Further options of this package's arms: what they change in section ``speed``."""
TRAIN: dict[str, dict[str, Any]] = {
    f"memory{percent}": {"activation_memory": percent / 100} for percent in (0, 25, 50, 75)
}
"""Options that change section ``train``: the share of activations that compiled layers keep, in percent."""
_STAGES = ("0", "1", "2", "3")


@dataclass(frozen=True)
class Settings:
    """Settings that all arms of one run share."""

    config: dict[str, Any]
    """The model's config.json."""
    ds_configs: str
    """Folder with zero0.json to zero3.json."""
    precision: str
    batch: int
    seq: int
    warmup: int
    steps: int
    part_steps: int
    target_rank: int
    schedule_steps: int
    """Length of the shortened allocation schedule (0: none)."""
    windows: tuple[int, int]
    delta_t: int
    """Steps between two mask updates of AdaLoRA (PEFT's deltaT)."""
    clip: float
    attention: str
    seed: int
    kernels: bool = False
    """Also say where the device's time goes, from a few steps under PyTorch's profiler."""
    scale: bool = False
    """Also count what is sent, and time what a checkpoint holds up."""


@dataclass(frozen=True)
class ArmSpec:
    """One row of the table, with everything that its processes need."""

    arm: str
    """peft_lora, peft_adalora, unsloth, or the name of a method of salient_ds."""
    loop: str
    """plain (a bare PyTorch loop on one process) or deepspeed."""
    zero: int
    """ZeRO stage; 0 for the plain loop."""
    rank: int
    gpus: int
    checkpointing: str
    """none, selective or all."""
    compiled: bool
    """Decoder layers are compiled with torch.compile, one by one."""
    settings: Settings = field(repr=False)
    fused_loss: bool = False
    """Output layer and loss are fused (liger-kernel, as with speed.liger=loss)."""
    speed: tuple[str, ...] = ()
    """Further options, names in :data:`SPEED` and :data:`TRAIN`."""

    @property
    def title(self) -> str:
        where = PLAIN if self.loop == PLAIN else f"zero{self.zero}"
        options = (" compiled" if self.compiled else "") + (" fused loss" if self.fused_loss else "")
        options += "".join(f" {name}" for name in self.speed)
        return f"{self.arm} r={self.rank} {where} x{self.gpus} checkpointing={self.checkpointing}{options}"

    def key(self) -> dict[str, Any]:
        """The fields that identify the arm in a record."""
        return {"arm": self.arm, "loop": self.loop, "zero": self.zero, "rank": self.rank, "gpus": self.gpus,
                "checkpointing": self.checkpointing, "compiled": self.compiled, "fused_loss": self.fused_loss,
                "speed": list(self.speed),
                "form": self.form}  # fmt: skip

    @property
    def graphs(self) -> bool:
        """Whether compiled layers are launched as CUDA graphs."""
        return GRAPHS in self.speed

    @property
    def form(self) -> str:
        """Name shared by all arms with the same floor, for example ``r=64``."""
        return f"{'lora2 ' if self.arm == 'lora2' else ''}r={self.rank}"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ArmSpec:
        settings = Settings(**{**data["settings"], "windows": tuple(data["settings"]["windows"])})
        return cls(**{**data, "settings": settings, "speed": tuple(data.get("speed", ()))})


def own_methods() -> list[str]:
    """Names of salient_ds' methods."""
    return list(methods())


def split_name(name: str) -> tuple[str, list[str]]:
    """Split ``"salientlora+compile"`` into the arm and its options."""
    arm, *options = name.split("+")
    return arm, options


def parse_arms(text: str, ranks: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Parse ``"peft_lora,peft_adalora@480,salientlora"`` into names with their ranks.

    ``NAME@64+480`` has the ranks 64 and 480. A name without ``@`` gets all of ``ranks``.

    Raises:
        ValueError: an unknown arm or option (the message lists the known ones).
    """
    known = [*PEERS, *own_methods()]
    found = []
    for item in text.split(","):
        name, _, own = item.strip().partition("@")
        arm, options = split_name(name)
        further = {GRAPHS} if arm in PEERS else {*SPEED, *TRAIN}
        if arm not in known or set(options) - {COMPILED, FUSED_LOSS} - further:
            raise ValueError(
                f"--arms: {name!r} is unknown; known: {', '.join(known)}, all also with +{COMPILED} and +{FUSED_LOSS}, "
                f"with +{COMPILED}+{GRAPHS}, "
                f"own methods also with {', '.join('+' + option for option in (*SPEED, *TRAIN))}"
            )
        found.append((name, [int(rank) for rank in own.split("+")] if own else list(ranks)))
    return found


def parse_zero(text: str) -> list[tuple[str, int]]:
    """Parse ``"plain,2,3"`` into (loop, stage) pairs.

    Raises:
        ValueError: an item other than plain, 0, 1, 2, 3.
    """
    found = []
    for item in (part.strip() for part in text.split(",")):
        if item != PLAIN and item not in _STAGES:
            raise ValueError(f"--zero: {item!r} is none of {', '.join((PLAIN, *_STAGES))}")
        found.append((PLAIN, 0) if item == PLAIN else ("deepspeed", int(item)))
    return found


def impossible(spec: ArmSpec) -> str | None:
    """Return why an arm cannot run, or None if it can."""
    if spec.loop == PLAIN and spec.gpus > 1:
        return "the plain loop is one process"
    if spec.arm == UNSLOTH and spec.loop != PLAIN:
        return "Unsloth is timed in the plain loop"
    if spec.graphs and not spec.compiled:
        return "graphs are made of compiled layers"
    if spec.arm == UNSLOTH and (spec.compiled or spec.fused_loss):
        return "Unsloth brings kernels of its own"
    own = methods().get(spec.arm)
    partitioned = spec.zero == 3 and not (own is not None and own.packable and "unpacked" not in spec.speed)
    if spec.compiled and partitioned:
        return "layers that DeepSpeed's ZeRO-3 gathers are not compiled"
    if spec.fused_loss and partitioned:
        return "the fused loss reads a weight that ZeRO-3 has partitioned"
    if spec.arm == "peft_adalora" and spec.zero == 3:
        return "PEFT's update_and_allocate raises on parameters that ZeRO-3 has partitioned"
    return None


def plan(
    arms: Sequence[tuple[str, Sequence[int]]],
    zero: Sequence[tuple[str, int]],
    gpus: Sequence[int],
    checkpointing: Sequence[str],
    settings: Settings,
) -> tuple[list[ArmSpec], list[tuple[ArmSpec, str]]]:
    """Return (arms to run, arms left out with the reason). Arms to be compared with each other are adjacent."""
    ranks = list(dict.fromkeys(rank for _, own in arms for rank in own))
    run, left_out = [], []
    for count in gpus:
        for how in checkpointing:
            for loop, stage in zero:
                for rank in ranks:
                    for name in (name for name, own in arms if rank in own):
                        arm, options = split_name(name)
                        more = tuple(option for option in options if option in SPEED or option in TRAIN)
                        choices = COMPILED in options, settings, FUSED_LOSS in options, more
                        spec = ArmSpec(arm, loop, stage, rank, count, how, *choices)
                        reason = impossible(spec)
                        if reason is None:
                            run.append(spec)
                        else:
                            left_out.append((spec, reason))
    return run, left_out
