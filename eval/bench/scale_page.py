"""The record of scale.py as a Markdown page. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .record import markdown_table

COLUMNS = (
    "shape", "scaling", "arm", "ZeRO", "rank", "GPUs", "rows per GPU", "s/step", "spread", "tokens/s", "x one GPU",
    "peak GiB", "stall s",
)  # fmt: skip
TRAFFIC = (
    "shape", "scaling", "arm", "ZeRO", "GPUs", "per step: summed, gathered", "by formula", "events", "bytes per event",
    "by formula", "s per event",
)  # fmt: skip


def page(found: Mapping[str, Any]) -> str:
    """Command, machine, the table of times and that of traffic, and what is missing."""
    hardware = found["hardware"]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    parts = [
        f"# Scaling: {hardware.get('gpu') or hardware['cpu']}",
        f"Command, at commit {found['commit']}, {found['date']}:",
        f"    {found['command']}",
        "Random weights. Seconds: median over at least three blocks, of the slowest process. x one GPU: tokens/s "
        "against the same arm on one GPU (weak scaling: the number of GPUs is perfect). Stall: what a checkpoint adds "
        f"to the step after it. Versions: {versions}.",
        markdown_table(COLUMNS, [times(arm, found["arms"]) for arm in found["arms"]]),
        "Bytes that one process puts into sums, and the whole of what is gathered, in a step; the formulas of "
        "docs/communication.md beside them. Events: the most that one without a compaction sums beyond its step.",
        markdown_table(TRAFFIC, [traffic(arm) for arm in found["arms"]]),
    ]  # fmt: skip
    if found["missing"]:
        parts.append("Not in the tables:\n\n" + "\n".join(f"- {line}" for line in found["missing"]))
    return "\n\n".join(parts) + "\n"


def titled(arm: Mapping[str, Any]) -> list[str]:
    name = f"{arm['arm']}{' (compiled)' if arm['compiled'] else ''}"
    return [arm["shape"], arm["scaling"], name, str(arm["zero"])]


def times(arm: Mapping[str, Any], arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """A row of the first table."""
    same = ("shape", "scaling", "arm", "zero", "rank", "compiled")
    one = next((a for a in arms if a["gpus"] == 1 and all(a[key] == arm[key] for key in same)), None)
    stall = arm["scale"].get("stall")
    return [
        *titled(arm), str(arm["rank"]), str(arm["gpus"]), str(arm["batch"]), f"{arm['seconds']:.4f}",
        f"{100 * arm['spread']:.1f} %", f"{arm['tokens_per_s']:,.0f}",
        "-" if one is None else f"{arm['tokens_per_s'] / one['tokens_per_s']:.2f}", f"{arm['peak_gib']:.2f}",
        "-" if stall is None else f"{stall:.3f}",
    ]  # fmt: skip


def traffic(arm: Mapping[str, Any]) -> list[str]:
    """A row of the second table."""
    scale = arm["scale"]
    events = scale.get("events") or []
    said = scale.get("step_by_formula") if arm["gpus"] > 1 else None
    return [
        *titled(arm), str(arm["gpus"]), both(scale["step"]), "-" if said is None else both(said), str(len(events)),
        f"{max(event['bytes'] for event in events):,}" if events else "-",
        f"{events[0]['bytes_by_formula']:,}" if events else "-",
        f"{max(event['seconds'] for event in events):.3f}" if events else "-",
    ]  # fmt: skip


def both(traffic: Mapping[str, Any]) -> str:
    return f"{traffic['summed']:,.0f}, {traffic['gathered']:,.0f}"
