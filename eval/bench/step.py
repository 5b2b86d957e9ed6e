"""Time training steps of PEFT's LoRA and AdaLoRA and of the methods of this package, in the same loop and engine.

    python eval/bench/step.py --shape tiny --gpus 1,2                            # CPU
    python eval/bench/step.py --shape llama-7b --arms peft_lora,peft_adalora@480,salientlora --zero plain,2,3

Every arm runs in separate processes. The record is written after each, so that an interrupted run keeps its results.
"""

from __future__ import annotations

if not __package__:
    import standalone

    __package__ = standalone.PACKAGE

import datetime
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from salient_ds.adapters.options import LLAMA_MODULES
from salient_ds.methods.lora2.options import LoRA2Config

from . import record
from .drive import ArmFailed, run_worker
from .floor import step_flops
from .plan import PEERS, ArmSpec, Settings, parse_arms, parse_zero, plan, split_name
from .shapes import Shape, find_shape

USAGE_ERROR, FAILED_ARMS = 2, 1


def main(
    shape: Annotated[str, typer.Option(help="llama-7b, tiny, or a directory with a config.json.")] = "tiny",
    arms: Annotated[
        str,
        typer.Option(
            help="peft_lora, peft_adalora, unsloth and methods of this package. NAME@64+480 sets the ranks of one arm, "
            "NAME+compile compiles its layers one by one, NAME+compile+graphs launches them as CUDA graphs, NAME+liger "
            "uses the fused loss of liger-kernel. Own methods also: +targets, +unfused, +unpacked (speed.target_head, "
            "neither fused_statistics nor flat_gradients, packing=none), +memory50 (train.activation_memory=0.5; 0, "
            "25, 50 or 75)."
        ),
    ] = "peft_lora,peft_lora+compile,peft_adalora,salientlora",
    zero: Annotated[str, typer.Option(help="Any of plain (no DeepSpeed), 0, 1, 2, 3.")] = "plain,2,3",
    ranks: Annotated[str, typer.Option(help="Ranks (default: the shape's).")] = "",
    gpus: Annotated[str, typer.Option(help="Process counts, for example 1,2.")] = "1",
    checkpointing: Annotated[str, typer.Option(help="Activation checkpointing: none, selective, all.")] = "none",
    batch: Annotated[int, typer.Option(help="Sequences per process and step (0: the shape's).")] = 0,
    seq: Annotated[int, typer.Option(help="Tokens per sequence (0: the shape's default).")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps.")] = 24,
    warmup: Annotated[int, typer.Option(min=1, help="Untimed steps before the timed ones.")] = 4,
    part_steps: Annotated[int, typer.Option(min=0, help="Extra steps that time forward, backward, step.")] = 3,
    target_rank: Annotated[int, typer.Option(help="Mean rank at the end of the schedule (0: the shape's).")] = 0,
    schedule_steps: Annotated[int, typer.Option(help="Length of the shortened schedule (0: none).")] = 30,
    windows: Annotated[str, typer.Option(help="First and last window of that schedule (steps).")] = "3,8",
    delta_t: Annotated[int, typer.Option(min=1, help="Steps between AdaLoRA's mask updates (PEFT: 1).")] = 1,
    clip: Annotated[float, typer.Option(min=0, help="Bound of the gradient norm (0: none).")] = 1.0,
    precision: Annotated[str, typer.Option(help="bf16 or fp32 (default: bf16 on a GPU, else fp32).")] = "",
    attention: Annotated[str, typer.Option(help="sdpa, eager or flash_attention_2.")] = "sdpa",
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    ds_configs: Annotated[Path, typer.Option(help="Folder with zero0.json to zero3.json.")] = record.REPOSITORY
    / "ds_configs",
    out: Annotated[Path, typer.Option(help="Folder in which the record's folder is created.")] = record.REPOSITORY
    / "eval"
    / "records",
    timeout: Annotated[float, typer.Option(help="Time limit for one arm (seconds).")] = 300,
    deadline: Annotated[float, typer.Option(help="Start no arm after this many seconds (0: no limit).")] = 0,
    launcher: Annotated[bool, typer.Option("--launcher", help="Use DeepSpeed's launcher for one process too.")] = False,
    log: Annotated[Path | None, typer.Option(help="File for the output of all arms (default: temporary).")] = None,
    commit: Annotated[str, typer.Option(help="Commit named in the record, if there is no git.")] = "",
    kernels: Annotated[bool, typer.Option("--kernels", help="Also profile: device time by kind of kernel.")] = False,
    seed: int = 0,
) -> None:
    """Time training steps of several arms in one run and write a record."""
    began = time.monotonic()
    try:
        model = find_shape(shape)
        chosen = parse_arms(arms, integers(ranks, "--ranks") or list(model.ranks))
        pair = integers(windows, "--windows")
        if len(pair) != 2:
            raise ValueError(f"--windows {windows!r}: expected two numbers, the first and the last window")
        counts, recompute = integers(gpus, "--gpus"), checkpointing.split(",")
        stages = parse_zero(zero)
        if set(recompute) - {"none", "selective", "all"} or precision not in ("", "bf16", "fp32"):
            raise ValueError(
                f"--checkpointing {checkpointing} or --precision {precision}: none/selective/all, bf16/fp32 are known"
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
    log = log or Path(tempfile.mkstemp(prefix="bench-", suffix=".log")[1])
    facts = probe(device, precision, timeout, log)
    on_cpu = facts["hardware"]["device"] == "cpu"
    settings = Settings(
        config=model.config, ds_configs=str(ds_configs.resolve()),
        precision=precision or ("fp32" if on_cpu else "bf16"),
        batch=batch or model.batch, seq=seq or model.seq, warmup=warmup, steps=steps, part_steps=part_steps,
        target_rank=target_rank or model.target_rank, schedule_steps=schedule_steps, windows=(pair[0], pair[1]),
        delta_t=delta_t, clip=clip, attention=attention, seed=seed, kernels=kernels,
    )  # fmt: skip
    specs, left_out = plan(chosen, stages, counts, recompute, settings)
    page = first_page(model, settings, facts, specs, commit) | {
        "left_out": [{"title": spec.title, **spec.key(), "reason": reason} for spec, reason in left_out]
    }
    hardware = record.hardware_name(facts["hardware"], max(counts))
    folder = record.new_folder(
        out, model.name, [split_name(name)[0] for name, _ in chosen], hardware, datetime.date.today()
    )
    limit = began + deadline if deadline else float("inf")
    run_arms(specs, page, folder=folder, launcher=launcher, cpu=on_cpu, timeout=timeout, limit=limit, log=log)
    show(page)
    print(f"record: {folder}", file=sys.stderr)
    raise SystemExit(FAILED_ARMS if page["failed"] else 0)


def integers(text: str, option: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",") if item.strip()]
    except ValueError:
        raise ValueError(f"{option} {text!r}: expected whole numbers separated by commas") from None


def probe(device: str, precision: str, timeout: float, log: Path) -> dict[str, Any]:
    """Find machine, versions and matrix rate in a separate process, so that this one never holds GPU memory."""
    try:
        request = {"probe": {"device": device, "precision": precision}}
        found = run_worker(request, 1, False, device == "cpu", timeout, log)
    except ArmFailed as error:
        print(f"error: {error} (output: {log})", file=sys.stderr)
        raise SystemExit(FAILED_ARMS) from None
    return {key: found[key] for key in ("hardware", "versions", "matrix_rate")}


def first_page(
    model: Shape, settings: Settings, facts: dict[str, Any], specs: list[ArmSpec], commit: str
) -> dict[str, Any]:
    """The record's content before any arm has run."""
    rate = facts["matrix_rate"]["flops_per_second"]
    compacted = [replace(spec, rank=settings.target_rank) for spec in specs if spec.arm not in PEERS]
    flops = {
        spec.form: step_flops(
            model.config, LLAMA_MODULES, spec.rank, settings.batch, settings.seq,
            LoRA2Config.model_fields["inner_width"].default if spec.arm == "lora2" else None,
        )
        for spec in (*specs, *compacted)
    }  # fmt: skip
    return {
        "command": record.recorded_command("step.py", sys.argv[1:]),
        "commit": commit or record.commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": model.name,
        **facts,
        "settings": {key: value for key, value in asdict(settings).items() if key != "ds_configs"},
        "flops_per_step_and_process": {form: count.to_dict() for form, count in flops.items()},
        "floor_seconds": {form: count.seconds(rate) for form, count in flops.items()},
        "arms": [],
        "failed": [],
    }


def run_arms(
    specs: list[ArmSpec], page: dict[str, Any], *, folder: Path, launcher: bool, cpu: bool, timeout: float,
    limit: float, log: Path,
) -> None:  # fmt: skip
    """Run every arm, and write the record after each.

    Args:
        limit: value of ``time.monotonic()`` after which no further arm is started.
        log: file for the output of all arms.
    """
    for number, spec in enumerate(specs, 1):
        began = time.monotonic()
        if began > limit:
            page["left_out"].append({"title": spec.title, **spec.key(), "reason": "no time left (--deadline)"})
            record.write(folder, page)
            continue
        print(f"[{number}/{len(specs)}] {spec.title}", end=" ", file=sys.stderr, flush=True)
        with open(log, "a") as out:
            out.write(f"=== {spec.title}\n")
        try:
            use_launcher = launcher and spec.loop != "plain"
            arm = run_worker(asdict(spec), spec.gpus, use_launcher, cpu, min(timeout, limit + 60 - began), log)
        except ArmFailed as error:
            page["failed"].append({"title": spec.title, **spec.key(), "error": record.without_places(str(error))})
            outcome = f"failed: {error} (output: {log})"
        else:
            later = arm.pop("after_compaction", None)
            found = [*page["arms"], arm, *([later] if later else [])]
            page["arms"] = record.with_ratios(found, page["floor_seconds"])
            if arm.get("schedule_error"):
                reason = record.without_places(arm["schedule_error"])
                page["failed"].append({"title": f"schedule of {spec.title}", **spec.key(), "error": reason})
            outcome = f"{arm['seconds']:.4f} s per step"
        print(f"{outcome}, took {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        record.write(folder, page)


def show(page: dict[str, Any]) -> None:
    """Print the table, the schedules and the missing arms."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{page['model']}, {page['hardware'].get('gpu') or page['hardware']['cpu']}")
    for column in record.COLUMNS:
        table.add_column(column, justify="left" if column in ("arm", "loop") else "right", no_wrap=True)
    for arm in page["arms"]:
        table.add_row(*record.row(arm))
    Console(width=max(176, Console().width)).print(table)
    for line in [*record.schedule_lines(page["arms"]), *record.missing_lines(page)]:
        print(line)


if __name__ == "__main__":
    typer.run(main)
