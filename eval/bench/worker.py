"""Run one arm, or the probe of the machine, in separate processes. step.py starts this; do not start it by hand.

``worker.py SPEC.json RESULT.json``: SPEC is an :class:`ArmSpec` or ``{"probe": ...}``. The main process writes RESULT.
"""

from __future__ import annotations

if not __package__:
    import standalone

    __package__ = standalone.PACKAGE

import argparse
import json
import os
import platform
import subprocess
import traceback
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from .plan import PEFT_ARMS, PLAIN, UNSLOTH, ArmSpec

if TYPE_CHECKING:
    from .timing import Measurement

PACKAGES = ("deepspeed", "transformers", "peft", "accelerate", "liger-kernel", "numpy", "pydantic", "unsloth")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("result", type=Path)
    args, _ = parser.parse_known_args()
    request = json.loads(args.spec.read_text())
    is_main = int(os.environ.get("RANK", "0")) == 0
    try:
        result = probe(request["probe"]) if "probe" in request else run_arm(ArmSpec.from_dict(request))
    except Exception as error:
        if not args.result.exists():  # the process that fails first knows the cause
            args.result.write_text(json.dumps({"error": explain(error)}))
        raise
    if is_main:
        args.result.write_text(json.dumps(result))
    if "probe" not in request:
        from salient_ds.zero.environment import stop

        stop()


def explain(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def run_arm(spec: ArmSpec) -> dict[str, Any]:
    """Run one arm; with ``settings.scale`` every collective is counted from its construction on."""
    if spec.arm == UNSLOTH:
        from .unsloth_arm import import_first

        import_first()
    device = join(spec)
    if not spec.settings.scale:
        return time_arm(spec, device, None)
    from .traffic import counted

    with counted() as log:
        return time_arm(spec, device, log)


def time_arm(spec: ArmSpec, device: Any, log: Any) -> dict[str, Any]:
    """Build the arm, time its steps, run its schedule if there is one, and time steps again after a compaction."""
    import torch

    from .kernels import kernel_table
    from .timing import measure

    arm = build(spec, device)
    settings = spec.settings
    draw = torch.Generator().manual_seed(settings.seed + int(os.environ.get("RANK", "0")))
    shape = (settings.batch, settings.seq)
    tokens_BS = torch.randint(3, int(settings.config["vocab_size"]), shape, generator=draw).to(device)
    first_loss = arm.loss(tokens_BS)
    measured = measure(lambda: arm.step(tokens_BS), arm.watch, settings.warmup, settings.steps, settings.part_steps)
    main = {**spec.key(), **arm.facts(), **times(spec, measured)}
    if settings.kernels:
        main["kernels"] = kernel_table(lambda: arm.step(tokens_BS), device)
    if log is not None:
        from .scale_arm import scale_facts

        main["scale"] = scale_facts(arm, spec, tokens_BS, log)
    schedule = run_schedule(arm, tokens_BS, log) if settings.schedule_steps else {}
    if log is not None and schedule.get("events"):
        from .scale_arm import event_facts

        main["scale"]["events"] = event_facts(arm, spec, schedule["events"], main["scale"]["step"]["summed"])
        for event in schedule["events"]:
            del event["sent"]
    found = {
        **main, "event_seconds": [], **schedule,
        "first_loss": first_loss,
        "last_loss": arm.loss(tokens_BS) if "schedule_error" not in schedule else None,
    }  # fmt: skip
    if any(event["compaction"] is not None for event in schedule.get("events", [])):
        again = measure(lambda: arm.step(tokens_BS), arm.watch, settings.warmup, settings.steps, settings.part_steps)
        found["after_compaction"] = {
            **spec.key(), **arm.facts(), "compacted": True, "rank": settings.target_rank,
            "form": replace(spec, rank=settings.target_rank).form, **times(spec, again), "event_seconds": [],
        }  # fmt: skip
        if settings.kernels:
            found["after_compaction"]["kernels"] = kernel_table(lambda: arm.step(tokens_BS), device)
    return found


def times(spec: ArmSpec, measured: Measurement) -> dict[str, Any]:
    """Timing results: the slowest process' median step, the largest peak, and the rates that follow from them.

    ``spread`` is the slowest block less the fastest one, as a share of the median; ``reserved_gib`` is None on a CPU.
    """
    settings = spec.settings
    middle = median(measured.seconds)
    spread = (max(measured.seconds) - min(measured.seconds)) / middle
    everyone = gather({"seconds": middle, "peak_gib": measured.peak_gib, "reserved_gib": measured.reserved_gib or 0.0,
                       "spread": spread})  # fmt: skip
    seconds = max(one["seconds"] for one in everyone)
    reserved = max(one["reserved_gib"] for one in everyone)
    return {
        "seconds": seconds,
        "tokens_per_s": spec.gpus * settings.batch * settings.seq / seconds,
        "peak_gib": max(one["peak_gib"] for one in everyone),
        "reserved_gib": reserved or None,
        "spread": max(one["spread"] for one in everyone),
        "parts": measured.parts,
        "seconds_of_steps": measured.seconds,
    }


def run_schedule(arm: Any, tokens_BS: Any, log: Any) -> dict[str, Any]:
    """Run the arm's schedule. A failure becomes ``schedule_error``, so that the steps timed before are kept."""
    try:
        found: dict[str, Any] = arm.run_schedule(tokens_BS, log)
    except Exception as error:
        traceback.print_exc()
        return {"schedule_error": explain(error)}
    return found


def join(spec: ArmSpec) -> Any:
    """Return the device of this process. Under DeepSpeed, also join the process group."""
    import torch

    if spec.loop != PLAIN:
        from salient_ds.zero.environment import start

        return start(timeout_minutes=10)
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", 0)


def build(spec: ArmSpec, device: Any) -> Any:
    if spec.arm in PEFT_ARMS:
        from .peft_arms import PeftArm

        return PeftArm.build(spec, device)
    if spec.arm == UNSLOTH:
        from .unsloth_arm import UnslothArm

        return UnslothArm.build(spec, device)
    from .own_arms import OwnArm

    return OwnArm.build(spec, device)


def gather(mine: dict[str, float]) -> list[dict[str, float]]:
    """Gather ``mine`` from every process."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def probe(request: dict[str, Any]) -> dict[str, Any]:
    """Find out hardware, package versions and the matrix rate of this machine."""
    import torch

    from .floor import matrix_rate

    on_gpu = request["device"] != "cpu" and torch.cuda.is_available()
    if request["device"] == "cuda" and not on_gpu:
        raise RuntimeError("--device cuda: PyTorch sees no GPU here")
    hardware: dict[str, Any] = {"device": "cuda" if on_gpu else "cpu", "cpu": cpu_name(), "cpu_cores": os.cpu_count()}
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        hardware |= {
            "gpu": properties.name, "gpus_seen": torch.cuda.device_count(),
            "gpu_memory_gib": properties.total_memory / 2**30, "driver": driver_version(),
        }  # fmt: skip
    dtype = "bfloat16" if (request["precision"] or ("bf16" if on_gpu else "fp32")) == "bf16" else "float32"
    versions = {name: installed(name) for name in PACKAGES}
    versions |= {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return {"hardware": hardware, "versions": versions, "matrix_rate": matrix_rate(hardware["device"], dtype)}


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def driver_version() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


if __name__ == "__main__":
    main()
