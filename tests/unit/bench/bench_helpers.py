"""Arms and records small enough for a test."""

from __future__ import annotations

from typing import Any

from salient_eval.bench.plan import ArmSpec, Settings
from salient_eval.bench.shapes import SHAPES

TINY = SHAPES["tiny"]


def settings(**changes: Any) -> Settings:
    values: dict[str, Any] = {
        "config": TINY.config, "ds_configs": "unused", "precision": "fp32", "batch": 2, "seq": 16, "warmup": 1,
        "steps": 2, "part_steps": 1, "target_rank": 4, "schedule_steps": 20, "windows": (3, 5), "delta_t": 1,
        "clip": 1.0, "attention": "sdpa", "seed": 0,
    }  # fmt: skip
    return Settings(**{**values, **changes})


def spec(arm: str, rank: int = 8, loop: str = "plain", zero: int = 0, gpus: int = 1, **changes: Any) -> ArmSpec:
    return ArmSpec(
        arm=arm,
        loop=loop,
        zero=zero,
        rank=rank,
        gpus=gpus,
        checkpointing="none",
        compiled=False,
        settings=settings(**changes),
    )


def timed(arm: str, seconds: float, rank: int = 8, loop: str = "plain", zero: int = 0, gpus: int = 1) -> dict[str, Any]:
    """An arm as a worker reports it."""
    return {
        "arm": arm, "loop": loop, "zero": zero, "rank": rank, "gpus": gpus, "checkpointing": "none", "compacted": False,
        "form": f"r={rank}", "seconds": seconds, "tokens_per_s": 1000 / seconds, "peak_gib": 1.5,
        "parts": {"forward": seconds / 3}, "event_seconds": [],
    }  # fmt: skip


def page(arms: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A record before it is written."""
    base: dict[str, Any] = {
        "command": "python eval/bench/step.py --shape tiny", "commit": "abc", "date": "2026-01-02T03:04:05+00:00",
        "model": "tiny", "hardware": {"device": "cuda", "gpu": "NVIDIA H100 80GB HBM3", "cpu": "x", "cpu_cores": 16},
        "versions": {"torch": "2.11.0"}, "matrix_rate": {"dtype": "bfloat16", "size": 8192, "flops_per_second": 8e14},
        "settings": {"precision": "bf16", "batch": 4, "seq": 512, "steps": 8, "warmup": 4, "clip": 1.0,
                     "delta_t": 1},
        "floor_seconds": {"r=8": 0.1}, "arms": arms, "failed": [], "left_out": [],
    }  # fmt: skip
    return {**base, **changes}
