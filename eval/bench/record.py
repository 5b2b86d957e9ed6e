"""Records: folders DATE_model_method_hardware with result.json and a README.md that shows it. Imports no torch."""

from __future__ import annotations

import datetime
import json
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .plan import PEERS

REPOSITORY = Path(__file__).resolve().parents[2]
COLUMNS = ("arm", "loop", "rank", "GPUs", "ckpt", "s/step", "spread", "tokens/s", "peak GiB", "reserved GiB",
           "x best PEFT LoRA", "x floor", "events s")  # fmt: skip
MARKS = {"compiled": "(compiled)", "fused_loss": "(fused loss)", "compacted": "(compacted)"}
"""Suffixes of an arm's name in the tables, by the key that turns them on."""
Row = Mapping[str, Any]


def with_ratios(arms: Sequence[Row], floors: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return the arms with ``ratio_to_floor`` and ``ratio_to_peft_lora`` added.

    A ratio above 1 means slower. ``ratio_to_peft_lora`` is that to the fastest peft_lora arm at equal rank, number of
    GPUs and checkpointing, compiled or not, in whichever loop; None if there is none.

    Args:
        floors: floor in seconds, by the form of the arms ("r=64").
    """
    same = ("rank", "gpus", "checkpointing")
    peft: dict[tuple[Any, ...], float] = {}
    for arm in arms:
        if arm["arm"] == "peft_lora":
            key = tuple(arm[name] for name in same)
            peft[key] = min(arm["seconds"], peft.get(key, arm["seconds"]))
    out = []
    for arm in arms:
        base = peft.get(tuple(arm[name] for name in same))
        ratios = {
            "ratio_to_floor": arm["seconds"] / floors[arm["form"]],
            "ratio_to_peft_lora": arm["seconds"] / base if base else None,
        }
        out.append({**arm, **ratios})
    return out


def row(arm: Row) -> list[str]:
    """One row of the table, with the cells of :data:`COLUMNS`."""
    events = arm.get("event_seconds") or []
    ratio, spread, reserved = (arm.get(key) for key in ("ratio_to_peft_lora", "spread", "reserved_gib"))
    marks = [name for key, name in MARKS.items() if arm.get(key)] + [f"({name})" for name in arm.get("speed", ())]
    return [
        " ".join([arm["arm"], *marks]),
        "plain" if arm["loop"] == "plain" else f"ZeRO-{arm['zero']}",
        str(arm["rank"]), str(arm["gpus"]), arm["checkpointing"],
        f"{arm['seconds']:.4f}", "-" if spread is None else f"{100 * spread:.1f} %", f"{arm['tokens_per_s']:,.0f}",
        f"{arm['peak_gib']:.2f}", f"{reserved:.2f}" if reserved else "-",
        f"{ratio:.2f}" if ratio else "-", f"{arm['ratio_to_floor']:.2f}",
        f"{len(events)} x {max(events):.3f}" if events else "-",
    ]  # fmt: skip


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def hardware_name(hardware: Row, gpus: int) -> str:
    """Short hardware name for a folder, for example ``1xh100``, ``2xh200`` or ``2-cpu-cores``."""
    if hardware["device"] == "cpu":
        return f"{hardware['cpu_cores']}-cpu-cores"
    short = re.search(r"\b[A-Z]{1,3}\d{1,4}[A-Z]?\b", hardware["gpu"])
    name = short.group() if short else re.sub(r"\W+", "-", hardware["gpu"]).strip("-")
    return f"{gpus}x{name.lower()}"


def new_folder(out: Path, model: str, arms: Sequence[str], hardware: str, today: datetime.date) -> Path:
    """Create the folder DATE_model_method_hardware in ``out``. If it exists, a number is appended.

    Raises:
        ValueError: there are already 999 such folders.
    """
    own = [name for name in dict.fromkeys(arms) if name not in PEERS] or list(dict.fromkeys(arms))
    name = "_".join((today.isoformat(), model, "-".join(own), hardware))
    for number in range(1, 1000):
        folder = out / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise ValueError(f"--out {out} holds a thousand records called {name}: choose another folder")


def commit() -> str:
    """The repository's commit, followed by "-dirty" if files differ from it. "unknown" outside a repository."""
    git = ["git", "-C", str(REPOSITORY)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return "unknown"
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return head.stdout.strip() + ("-dirty" if changed.stdout.strip() else "")


def recorded_command(script: str, arguments: Sequence[str]) -> str:
    """The command line of a script here, without what is specific to this machine (--out, --log, --commit)."""
    kept, skip = [], False
    for argument in arguments:
        name, _, value = argument.partition("=")
        if skip or name in ("--out", "--log", "--commit"):
            skip = not skip and not value
            continue
        kept.append(argument)
    return shlex.join(["python", f"eval/bench/{script}", *kept])


def without_places(text: str) -> str:
    """Replace the repository's path by ``.`` and the home directory by ``~``, so that a record can be published."""
    for place, sign in ((str(REPOSITORY), "."), (str(Path.home()), "~")):
        text = text.replace(place, sign) if len(place) > 1 else text
    return text


def write(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a record of step.py."""
    write_page(folder, record, readme(record))


def write_page(folder: Path, record: Mapping[str, Any], page: str) -> None:
    """Write result.json and README.md of a record, each atomically, so that an interrupted run keeps its last state."""
    for name, text in (("result.json", json.dumps(record, indent=1) + "\n"), ("README.md", page)):
        partial = folder / f"{name}.partial"
        partial.write_text(without_places(text))
        partial.replace(folder / name)


def readme(record: Mapping[str, Any]) -> str:
    """The record as a Markdown page: command, machine, tables, events, and arms that are missing."""
    hardware, settings, rate = record["hardware"], record["settings"], record["matrix_rate"]
    machine = hardware.get("gpu") or hardware["cpu"]
    floors = ", ".join(f"{form}: {floor:.4f} s" for form, floor in record["floor_seconds"].items())
    parts = [
        f"# Training steps: {record['model']}, {machine}",
        f"Command, at commit {record['commit']}, {record['date']}:",
        f"    {record['command']}",
        f"Random weights, {settings['precision']}, {settings['batch']} x {settings['seq']} tokens per process and "
        f"step, all linear layers of the decoder adapted, AdamW, gradients clipped at {settings['clip']:g}. Seconds "
        f"per step: median over at least three blocks out of {settings['steps']} steps, taken back to back as in "
        f"training, after {settings['warmup'] + 1}; spread: the slowest block less the fastest, as a share of the "
        "median; peaks are those of all steps but the first, of tensors and of what the allocator reserved. x best "
        "PEFT LoRA: against the fastest arm of PEFT's LoRA at equal rank, GPUs and checkpointing. "
        "AdaLoRA's update_and_allocate is part of every step (masks every "
        f"{settings['delta_t']} steps). Versions: "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
        + ".",
        f"Floor: counted matrix products (frozen: forward and input gradients; adapters: all; attention; no "
        f"recomputation) at the measured {rate['flops_per_second'] / 1e12:.4g} TFLOP/s ({rate['dtype']}, "
        f"{rate['size']} squared): {floors}.",
        markdown_table(COLUMNS, [row(arm) for arm in record["arms"]]),
        parts_table(record["arms"]),
        kernels_table(record["arms"]),
        *schedule_lines(record["arms"]),
        *missing_lines(record),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def parts_table(arms: Sequence[Row]) -> str:
    """Table of the seconds per part of a step. The device is idle at both ends of every part."""
    names = list(dict.fromkeys(name for arm in arms for name in arm["parts"]))
    rows = [
        [*row(arm)[:5], *(f"{arm['parts'][name]:.4f}" if name in arm["parts"] else "-" for name in names)]
        for arm in arms
    ]
    return markdown_table([*COLUMNS[:5], *names], rows) if arms else ""


def kernels_table(arms: Sequence[Row]) -> str:
    """Table of device time by kind of kernel, in milliseconds per step, for arms that were profiled."""
    profiled = [arm for arm in arms if arm.get("kernels")]
    kinds = list(dict.fromkeys(kind for arm in profiled for kind in arm["kernels"]["kinds"]))
    rows = [
        [
            *row(arm)[:5], f"{arm['kernels']['busy']:.1f}", f"{arm['kernels']['idle']:.1f}",
            str(arm["kernels"]["kernels"]), *(f"{arm['kernels']['kinds'].get(kind, 0):.1f}" for kind in kinds),
        ]
        for arm in profiled
    ]  # fmt: skip
    return markdown_table([*COLUMNS[:5], "busy ms", "idle ms", "kernels", *kinds], rows) if profiled else ""


def schedule_lines(arms: Sequence[Row]) -> list[str]:
    """One paragraph per arm that ran a shortened allocation schedule."""
    lines = []
    for arm in arms:
        if not arm.get("events"):
            continue
        steps = ", ".join(f"{e['step']} (to {e['kept']:,}, {e['seconds']:.3f} s)" for e in arm["events"])
        verdict = "exactly the target" if arm["exact"] else f"NOT the target {arm['target_total_rank']:,}"
        later = arm["seconds_after_events"]
        lines.append(
            f"{row(arm)[0]} {row(arm)[1]} r={arm['rank']} x{arm['gpus']}, checkpointing {arm['checkpointing']}, "
            f"shortened schedule: {arm['total_rank']:,} ranks, events after steps {steps}; {arm['final_total_rank']:,} "
            f"left, {verdict}."
            + (f" Steps after the last event: {later:.4f} s." if later is not None else "")
            + f" Peak {arm['peak_gib_schedule']:.2f} GiB."
        )
    return lines


def missing_lines(record: Mapping[str, Any]) -> list[str]:
    """List of the requested arms that are not in the table, with the reasons."""
    lines = [f"- failed: {item['title']}: {item['error']}" for item in record["failed"]]
    lines += [f"- left out: {item['title']}: {item['reason']}" for item in record["left_out"]]
    return ["Not in the table:", "\n".join(lines)] if lines else []
