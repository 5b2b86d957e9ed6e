"""Measure wall-clock time and peak memory of steps on a device that works asynchronously."""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import torch

GIB = 2**30
MIN_BLOCKS = 3


def wait(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Reset the peak-memory counter. Only for GPUs: on a CPU the peak is over the life of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def reserved_gib(device: torch.device) -> float | None:
    """Peak GiB that PyTorch's allocator has taken from the GPU since :func:`reset_peak`; None on a CPU.

    It is above :func:`peak_gib`, because freed blocks are kept in case that they are needed again.
    """
    return torch.cuda.max_memory_reserved(device) / GIB if device.type == "cuda" else None


def peak_gib(device: torch.device) -> float:
    """Peak memory in GiB: GPU tensors since :func:`reset_peak`, or the resident set of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


class Stopwatch:
    """Times named parts of a step. Off by default, because waiting for the device at every part slows the step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.enabled = False
        self.mark_steps = False
        """Whether the engine waits for the device after every optimizer step and sets ``stepped_at``."""
        self.stepped_at = 0.0
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time the block as part ``name``, if the watch is enabled."""
        if not self.enabled:
            yield
            return
        wait(self.device)
        began = time.perf_counter()
        yield
        wait(self.device)
        self.seconds[name].append(time.perf_counter() - began)

    def medians(self) -> dict[str, float]:
        return {name: median(values) for name, values in self.seconds.items()}


@dataclass(frozen=True)
class Measurement:
    """Timed steps of one arm on one process."""

    seconds: list[float]
    """Seconds per step, one value for every timed block."""
    parts: dict[str, float]
    """Median seconds of every part, from separate steps."""
    peak_gib: float
    reserved_gib: float | None = None
    """Peak of the allocator's reserve; None on a CPU."""


def blocks(steps: int) -> list[int]:
    """Divide ``steps`` into blocks of about eight, at least three. Within a block nothing waits for the device.

    Fewer than three steps are a block each. The median of the blocks is reported, with their spread.
    """
    count = max(min(steps, MIN_BLOCKS), steps // 8)
    return [steps // count + (index < steps % count) for index in range(count)]


def measure(step: Callable[[], object], watch: Stopwatch, warmup: int, steps: int, part_steps: int) -> Measurement:
    """Run ``warmup`` untimed steps, time ``steps`` steps in blocks, and time the parts of ``part_steps`` more steps."""
    device = watch.device
    reset_peak(device)
    for _ in range(warmup):
        step()
    seconds = []
    for block in blocks(steps):
        wait(device)
        began = time.perf_counter()
        for _ in range(block):
            step()
        wait(device)
        seconds.append((time.perf_counter() - began) / block)
    peak, reserved = peak_gib(device), reserved_gib(device)
    watch.seconds.clear()  # from an earlier measurement, before a compaction
    watch.enabled = True
    for _ in range(part_steps):
        step()
    watch.enabled = False
    return Measurement(seconds, watch.medians(), peak, reserved)
