"""Where the device's time goes in one training step: kernels by kind, and the time in which no kernel runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::_int_mm")
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "": ("gemm", "nvjet", "cutlass", "xmma", "splitk", "gemv"),
    "fused elementwise (Triton)": ("triton",),
    "optimizer": ("adam",),
    "communication": ("nccl",),
    "copies and concatenation": ("copy", "memcpy", "memset", "cat", "fill"),
}
"""Marks in the names of kernels, first match first. Products are under ""."""
STEPS = 3
LARGEST = 30
THIN = 1024
"""A product with a dimension below this one belongs to adapters."""


def kernel_table(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Profile :data:`STEPS` steps.

    Returns:
        ``kinds``: milliseconds per step by kind of kernel; ``busy`` and ``idle``: milliseconds per step in which some
        or no kernel ran, between the first and the last one; ``kernels``: number per step; ``largest``: the thirty
        operations with the most time, with the shapes of products. Profiling slows the host, so idle time is an upper
        bound. Empty on CPUs.
    """
    if device.type != "cuda":
        return {}
    step()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as found:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize(device)
    events: Any = found.events()
    spans = sorted((e.time_range.start, e.time_range.end) for e in events if on_device(e))
    kinds: defaultdict[str, float] = defaultdict(float)
    names: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if on_device(event):
            kind, name, own = kernel_kind(event.name), event.name, event.time_range.elapsed_us()
        elif event.name in PRODUCTS:  # only calls on the host know the sizes
            kind, name = product_kind(event.name, event.input_shapes)
            own = event.self_device_time_total
        else:
            continue
        if kind:
            kinds[kind] += own / 1000 / STEPS
            names[name[:120]] += own / 1000 / STEPS
    busy = covered(spans)
    whole = spans[-1][1] - spans[0][0] if spans else 0.0
    largest = sorted(names.items(), key=lambda item: -item[1])[:LARGEST]
    return {
        "kinds": {kind: round(ms, 3) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])},
        "busy": busy / 1000 / STEPS,
        "idle": (whole - busy) / 1000 / STEPS,
        "kernels": len(spans) // STEPS,
        "largest": {name: round(ms, 3) for name, ms in largest},
    }


def on_device(event: FunctionEvent) -> bool:
    """Whether the event is a kernel or a copy on the device: neither a call on the host nor a range around kernels."""
    return str(event.device_type) == "DeviceType.CUDA" and not event.is_user_annotation


def product_kind(name: str, shapes: Any) -> tuple[str, str]:
    """The kind of a matrix product, and a name that tells products of different sizes apart."""
    sizes = [tuple(shape) for shape in shapes or [] if len(shape) >= 2]
    smallest = min((size for shape in sizes for size in shape[-2:]), default=0)
    kind = "products with adapters" if smallest < THIN else "frozen products and output layer"
    return kind, f"{name} {' x '.join(map(str, sizes))}"


def kernel_kind(name: str) -> str:
    """The kind of a kernel by its name; "" for a matrix product, which :func:`product_kind` counts."""
    lower = name.lower()
    for kind, marks in KINDS.items():
        if any(mark in lower for mark in marks):
            return kind
    return "other"


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals, which are sorted by their begin."""
    total, end = 0.0, float("-inf")
    for begin, stop in spans:
        total += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return total
