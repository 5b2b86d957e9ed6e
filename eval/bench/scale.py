"""How steps, events and checkpoints scale with the number of GPUs, beside PEFT's LoRA in the same engine; a record.

    python eval/bench/scale.py                                        # 1, 2, 4, 8 GPUs: LLaMA-7B and 13B, ZeRO-2 and 3
    python eval/bench/scale.py --gpus 1,2 --shapes llama-7b --scaling weak
    python eval/bench/scale.py --shapes tiny --gpus 1,2 --device cpu  # a rehearsal on CPU processes

Weak scaling gives every GPU the shape's batch; strong scaling divides one global batch, a row per GPU on the most GPUs.
What is sent is counted on every process and compared with the formulas of docs/communication.md.
"""

from __future__ import annotations

if not __package__:
    import standalone

    __package__ = standalone.PACKAGE

import datetime
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from . import record
from .drive import ArmFailed, run_worker
from .plan import ArmSpec, Settings, parse_arms, parse_zero, plan
from .scale_page import page
from .shapes import Shape, find_shape
from .step import integers, probe

KINDS = ("weak", "strong")


def main(
    shapes: Annotated[str, typer.Option(help="Shapes of step.py, separated by commas.")] = "llama-7b,llama-13b",
    arms: Annotated[str, typer.Option(help="As in step.py.")] = "peft_lora+compile@64,salientlora+compile@64",
    zero: Annotated[str, typer.Option(help="ZeRO stages.")] = "2,3",
    gpus: Annotated[str, typer.Option(help="Process counts; one that is not there is left out.")] = "1,2,4,8",
    scaling: Annotated[str, typer.Option(help="weak, strong or both.")] = "weak,strong",
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 24,
    warmup: Annotated[int, typer.Option(min=1, help="Untimed steps before.")] = 4,
    schedule_steps: Annotated[int, typer.Option(help="Length of the shortened schedule (0: no events).")] = 12,
    timeout: Annotated[float, typer.Option(help="Time limit for one arm (seconds).")] = 300,
    deadline: Annotated[float, typer.Option(help="Start no arm after this many seconds (0: no limit).")] = 0,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    out: Annotated[Path, typer.Option(help="Folder for the record's folder.")] = record.REPOSITORY / "eval" / "records",
    commit: Annotated[str, typer.Option(help="Commit named in the record, if there is no git.")] = "",
    log: Annotated[Path | None, typer.Option(help="File for the output of all arms (default: temporary).")] = None,
) -> None:
    """Time arms on several numbers of GPUs and write a record."""
    began = time.monotonic()
    try:
        models = [find_shape(name) for name in shapes.split(",")]
        counts, kinds = integers(gpus, "--gpus"), scaling.split(",")
        chosen, stages = parse_arms(arms, [64]), parse_zero(zero)
        if set(kinds) - set(KINDS):
            raise ValueError(f"--scaling {scaling!r}: {' and '.join(KINDS)} are known")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    log = log or Path(tempfile.mkstemp(prefix="scale-", suffix=".log")[1])
    facts = probe(device, "", timeout, log)
    cpu = facts["hardware"]["device"] == "cpu"
    there = 10**6 if cpu else facts["hardware"]["gpus_seen"]
    found: dict[str, Any] = {
        "command": record.recorded_command("scale.py", sys.argv[1:]), "commit": commit or record.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), **facts, "arms": [],
        "missing": [f"{count} GPUs: this machine has {there}" for count in counts if count > there],
    }  # fmt: skip
    counts = [count for count in counts if count <= there]
    hardware = record.hardware_name(facts["hardware"], max(counts, default=1))
    folder = record.new_folder(out, "scale", [model.name for model in models], hardware, datetime.date.today())
    limit = began + deadline if deadline else float("inf")
    for model, kind, spec in specs(models, kinds, counts, chosen, stages, cpu, (steps, warmup, schedule_steps)):
        title = f"{model.name} {kind}: {spec.title}"
        if time.monotonic() > limit:
            found["missing"].append(f"{title}: no time left (--deadline)")
            continue
        try:
            arm = run_worker(asdict(spec), spec.gpus, False, cpu, timeout, log)
            found["arms"].append({**arm, "shape": model.name, "scaling": kind, "batch": spec.settings.batch})
            print(f"{title}: {arm['seconds']:.4f} s per step", flush=True)
        except ArmFailed as error:
            found["missing"].append(f"{title}: {error}")
            print(f"{title}: {error}", file=sys.stderr, flush=True)
        record.write_page(folder, found, page(found))
    record.write_page(folder, found, page(found))
    print(f"record: {folder}", file=sys.stderr)
    raise SystemExit(0 if found["arms"] else 1)


def specs(
    models: Sequence[Shape], kinds: Sequence[str], counts: Sequence[int],
    arms: Sequence[tuple[str, Sequence[int]]], stages: Sequence[tuple[str, int]], cpu: bool,
    lengths: tuple[int, int, int],
) -> list[tuple[Shape, str, ArmSpec]]:  # fmt: skip
    """All arms that can run, those to be compared next to each other."""
    steps, warmup, schedule = lengths
    found = []
    for model in models:
        for kind in kinds:
            for count in counts:
                batch = model.batch if kind == "weak" else max(1, max(counts) // count)
                settings = Settings(
                    config=model.config, ds_configs=str(record.REPOSITORY / "ds_configs"),
                    precision="fp32" if cpu else "bf16", batch=batch, seq=model.seq, warmup=warmup, steps=steps,
                    part_steps=2, target_rank=max(1, model.target_rank // 2), schedule_steps=schedule, windows=(3, 5),
                    delta_t=1, clip=1.0, attention="sdpa", seed=0, scale=True,
                )  # fmt: skip
                possible, _ = plan(arms, stages, [count], ["none"], settings)
                found += [(model, kind, spec) for spec in possible]
    return found


if __name__ == "__main__":
    typer.run(main)
