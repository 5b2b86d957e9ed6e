"""What fits into a given memory: ZeRO stage, micro-batch, recomputation. ``check --fit`` and ``init`` ask. No torch.

Choices are tried in this order, and the first that fits is taken:

1. ZeRO-2, ZeRO-3 (on several processes), ZeRO-2 with the optimizer on the host, ZeRO-3 with everything on the host.
2. At each of them: all activations kept, half of them (compiled layers only), none. Recomputing costs time, so it is
   chosen only where a forward pass of at least 2,048 tokens (or of all examples of a process) fits no other way.
3. The largest micro-batch that divides the global batch, up to 16,384 tokens.

If no forward pass of that size fits, the largest that does at the first stage where any fits is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from salient_ds.check.memory import GIB, estimate, workload
from salient_ds.check.model_shapes import Architecture
from salient_ds.check.report import MemoryInputs, Report
from salient_ds.config.run import RunConfig
from salient_ds.config.speed import compiles
from salient_ds.zero.ds_json import DsSummary, summary

ENOUGH, MOST = 2048, 16384
"""Tokens of a forward pass: from here on more of them gain little; more than this is never chosen."""
CONTEXT = GIB // 2
"""Bytes of the CUDA context, which the estimate leaves out."""
USABLE = 0.95
"""Share of a card's memory that a run may plan with: the rest is fragmentation."""


@dataclass(frozen=True)
class Choice:
    """One way to run that fits."""

    stage: int
    offload: bool
    micro_batch_size: int
    activation_checkpointing: str
    activation_memory: float
    peak: int
    """Estimated bytes on one process, CUDA context included."""
    host: int
    """Bytes on the host for one process."""

    @property
    def zero(self) -> str:
        """The file of ds_configs/ that sets this stage, without its ending."""
        return f"zero{self.stage}{'_offload' if self.offload else ''}"

    def settings(self) -> dict[str, Any]:
        """Keys of the run file with their values."""
        return {
            "train.micro_batch_size": self.micro_batch_size,
            "train.activation_checkpointing": self.activation_checkpointing,
            "train.activation_memory": self.activation_memory,
        }


def bytes_of(text: str) -> int:
    """Bytes of a card's memory such as 80GB, 24GiB or 24. Vendors' GB are GiB.

    Raises:
        ValueError: it is not such a size.
    """
    found = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*(?:GB|GiB|G)?\s*", text, re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise ValueError(f"{text!r} is no memory of a GPU: write it as 24GB or 80GB")
    return round(float(found[1]) * GIB)


def limit(memory: int) -> int:
    """Bytes that an estimate may have on a card with ``memory`` bytes."""
    return round(USABLE * memory) - CONTEXT


def fitting(run: RunConfig, inputs: MemoryInputs, ds: DsSummary, world_size: int, memory: int) -> Choice | None:
    """The first choice that fits into ``memory`` bytes; None if none does, or the model's layers are not known.

    Args:
        ds: buffer sizes are taken from it, whatever its stage.
    """
    if inputs.architecture is None:
        return None
    fallback: Choice | None = None
    for stage, offload in _stages(world_size):
        zero = replace(ds, stage=stage, offload_optimizer=offload, offload_param=offload and stage == 3)
        best: Choice | None = None
        for keeping in _activations(run):
            for micro in _micro_batches(run, world_size):
                peak, host = _needs(run, inputs, zero, world_size, {"micro_batch_size": micro, **keeping})
                if peak > limit(memory):
                    continue
                choice = Choice(stage, offload, micro, **keeping, peak=peak + CONTEXT, host=host)
                if _is_enough(run, micro, world_size):
                    return choice
                if best is None or micro > best.micro_batch_size:
                    best = choice
                break  # smaller ones fit too
        fallback = fallback or best
    return fallback


def fit_facts(run: RunConfig, report: Report, memory: int) -> dict[str, Any]:
    """What ``check --fit`` found.

    Returns:
        memory (bytes), as_it_is (bytes that the run needs as it is; None if not known), fits (whether that fits), and
        either problem (why there is no choice) or zero (name of a file of ds_configs/), settings, peak and host.
    """
    inputs, ds = report.memory_inputs, report.facts.get("ds_config")
    found: dict[str, Any] = {"memory": memory, "as_it_is": None, "fits": None}
    if inputs is None or ds is None:
        return found | {"problem": "what fits is not known: model, adapters or ZeRO JSON could not be read"}
    if (unknown := unknown_layers(inputs.architecture)) is not None:
        return found | {"problem": unknown}
    now = report.facts["this_run"]["peak"]
    found |= {"as_it_is": now + CONTEXT, "fits": now <= limit(memory)}
    choice = fitting(run, inputs, summary(ds), report.facts["processes"], memory)
    if choice is None:
        return found | {"problem": "nothing fits, not even one example with ZeRO-3 and everything on the host"}
    return found | {"zero": choice.zero, "settings": choice.settings(), "peak": choice.peak, "host": choice.host}


def fit_text(found: dict[str, Any]) -> str:
    """One line for the report of ``check``."""
    size = f"{found['memory'] / GIB:.0f} GiB"
    now = ""
    if found["as_it_is"] is not None:
        verdict = "fits" if found["fits"] else "does not fit"
        now = f"; as it is, this run needs about {found['as_it_is'] / GIB:.1f}, which {verdict}"
    if "problem" in found:
        return f"{size}: {found['problem']}{now}"
    settings = " ".join(f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}"
                        for key, value in found["settings"].items())  # fmt: skip
    host = f" and {found['host'] / GIB:.1f} on the host" if found["host"] else ""
    return f"{size}: deepspeed={found['zero']}.json {settings}, about {found['peak'] / GIB:.1f}{host}{now}"


def _needs(
    run: RunConfig, inputs: MemoryInputs, zero: DsSummary, world_size: int, changes: dict[str, Any]
) -> tuple[int, int]:
    """Bytes on a card and on the host, with some settings of section train changed."""
    changed = run.model_copy(update={"train": run.train.model_copy(update=changes)})
    base, shape = inputs.base_parameters, inputs.architecture
    work = workload(changed, base, inputs.layout, shape, world_size, inputs.in_full)
    found = estimate(work, zero, world_size)
    return found.peak, found.host


def _stages(world_size: int) -> list[tuple[int, bool]]:
    """(stage, offload) in the order in which they are tried. One process has nothing to divide."""
    return [(2, False), *([(3, False)] if world_size > 1 else []), (2, True), (3, True)]


def _activations(run: RunConfig) -> Iterator[dict[str, Any]]:
    yield {"activation_checkpointing": "none", "activation_memory": 1.0}
    if compiles(run.speed, run.method, run.speed_plan(2).packed, on_gpu=True) and run.train.precision != "fp32":
        yield {"activation_checkpointing": "none", "activation_memory": 0.5}
    yield {"activation_checkpointing": "all", "activation_memory": 1.0}


def _share(run: RunConfig, world_size: int) -> int:
    """Examples of one process in one step."""
    return max(1, run.train.global_batch_size // world_size)


def _micro_batches(run: RunConfig, world_size: int) -> list[int]:
    """Micro-batches that divide the examples of one process, from the largest on."""
    share = _share(run, world_size)
    most = max(1, MOST // run.data.max_length)
    return [size for size in range(min(share, most), 0, -1) if share % size == 0]


def _is_enough(run: RunConfig, micro: int, world_size: int) -> bool:
    return micro == _share(run, world_size) or micro * run.data.max_length >= ENOUGH


def unknown_layers(architecture: Architecture | None) -> str | None:
    """Why nothing can be said about what fits, as a sentence; None if something can."""
    if architecture is not None:
        return None
    return (
        "what fits is not known: the activations of this model family are not in the estimate; begin with "
        "train.micro_batch_size=1 and raise it"
    )
