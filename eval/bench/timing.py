"""Wall-clock times and peak memory of steps on a device that works asynchronously."""

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


def wait(device: torch.device) -> None:
    """Return once the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    """Start counting peak memory anew (GPU only: a CPU process' peak is over its whole life)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float:
    """Most memory in use: tensors on the GPU since :func:`reset_peak`, or the process' resident set on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


class Stopwatch:
    """Seconds of named parts of a step. Off by default: waiting for the device at every part would slow the step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.enabled = False
        self.mark_steps = False
        """Wait for the device after every optimizer step and remember when that was."""
        self.stepped_at = 0.0
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside as ``name`` if the watch is on."""
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
    """Steps of one arm on one process."""

    seconds: list[float]
    """Seconds per step of every timed block."""
    parts: dict[str, float]
    """Median seconds of the parts, from steps of their own."""
    peak_gib: float


def blocks(steps: int) -> list[int]:
    """``steps`` in blocks of about eight: inside one nobody waits for the device between steps, as in training."""
    count = max(1, steps // 8)
    return [steps // count + (index < steps % count) for index in range(count)]


def measure(step: Callable[[], object], watch: Stopwatch, warmup: int, steps: int, part_steps: int) -> Measurement:
    """Time ``steps`` calls, in blocks, after ``warmup`` untimed ones; then the parts of ``part_steps`` more."""
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
    peak = peak_gib(device)
    watch.seconds.clear()  # of an earlier measurement, before a compaction
    watch.enabled = True
    for _ in range(part_steps):
        step()
    watch.enabled = False
    return Measurement(seconds, watch.medians(), peak)
