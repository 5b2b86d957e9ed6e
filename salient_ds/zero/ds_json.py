"""Reads the ZeRO JSON, checks it, and fills its "auto" fields from the run. Imports neither torch nor deepspeed.

The file stays plain DeepSpeed JSON that works elsewhere. Numbers that the run file owns (batch sizes, precision,
clipping, optimizer hyper-parameters) are "auto" or missing there. A concrete value that differs from the run file is
refused, and the message names both places.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salient_ds.config.run import RunConfig
from salient_ds.strict import ConfigError, extreme
from salient_ds.zero.ds_resolve import Resolver


class DsProblems(ConfigError):
    """Everything that is wrong with a ZeRO JSON, one sentence each in ``problems``."""


@dataclass(frozen=True)
class DsSummary:
    """What a resolved ZeRO JSON means for memory: stage, offload, and buffer sizes in elements."""

    stage: int
    offload_optimizer: bool
    offload_param: bool
    overlap_comm: bool
    contiguous_gradients: bool
    reduce_bucket_size: int
    prefetch_bucket_size: int
    max_live_parameters: int


def load_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a ZeRO JSON.

    Raises:
        DsProblems: missing file, syntax error (with line and column), duplicate key, or not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise DsProblems([f"ZeRO JSON {str(path)!r} does not exist (working directory: {Path.cwd()})"])
    duplicates: list[str] = []

    def pairs_to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        duplicates.extend(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        return dict(pairs)

    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=pairs_to_dict)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise DsProblems([f"{path}: invalid JSON at {place}: {error.msg} (comments are not allowed)"]) from error
    except (OSError, ValueError) as error:  # also numbers of thousands of digits
        raise DsProblems([f"cannot read {path}: {error}"]) from error
    except RecursionError as error:
        raise DsProblems([f"cannot read {path}: it is nested too deeply"]) from error
    if duplicates:
        raise DsProblems([f"{path}: key {key!r} appears twice in one object: keep one" for key in duplicates])
    if not isinstance(raw, dict):
        raise DsProblems([f"{path} holds {type(raw).__name__}, expected an object of DeepSpeed settings"])
    problem = extreme(raw)
    if problem is not None:
        raise DsProblems([f"{path} cannot be a ZeRO JSON: {problem}"])
    return raw


def resolve_ds_config(
    raw: dict[str, Any],
    run: RunConfig,
    world_size: int,
    total_steps: int | None,
    *,
    hidden_size: int | None = None,
    source: str | None = None,
    run_source: str = "run.yaml",
) -> dict[str, Any]:
    """Return a copy of ``raw`` with every "auto" and every missing essential number filled in from the run.

    Args:
        raw: a ZeRO JSON as read by :func:`load_ds_config`; not changed.
        world_size: number of data-parallel processes.
        total_steps: applied optimizer steps of the run; None if unknown.
        hidden_size: the model's hidden size, from which "auto" buffer sizes are computed (None: DeepSpeed's defaults).
        source, run_source: names of the two files in messages.

    Raises:
        DsProblems: lists every problem found: unknown keys, wrong types, refused features, conflicts.
    """
    resolver = Resolver(copy.deepcopy(raw), run, world_size, source or run.deepspeed, run_source)
    resolver.drop_nulls()
    resolver.check_keys()
    if not resolver.problems:  # the steps below rely on sections being sections
        resolver.refuse(total_steps)
        resolver.batch()
        resolver.precision()
        resolver.optimizer()
        resolver.zero(hidden_size)
        resolver.monitors()
        resolver.leftovers(resolver.ds, "")
    if resolver.problems:
        raise DsProblems(resolver.problems)
    return resolver.ds


def summary(ds: dict[str, Any]) -> DsSummary:
    """Stage, offload flags and buffer sizes of a resolved ZeRO JSON. Missing keys have DeepSpeed's defaults."""
    zero = ds.get("zero_optimization") or {}
    stage = int(zero.get("stage", 0))

    def offloaded(section: str) -> bool:
        return bool((zero.get(section) or {}).get("device", "none") == "cpu")

    def size(name: str, default: float) -> int:
        return int(zero.get(f"stage3_{name}", zero.get(name, default)))

    overlap = zero.get("overlap_comm")
    return DsSummary(
        stage=stage,
        offload_optimizer=offloaded("offload_optimizer"),
        offload_param=offloaded("offload_param"),
        overlap_comm=stage == 3 if overlap is None else overlap,
        contiguous_gradients=zero.get("contiguous_gradients", True),
        reduce_bucket_size=size("reduce_bucket_size", 5e8),
        prefetch_bucket_size=size("prefetch_bucket_size", 5e7),
        max_live_parameters=size("max_live_parameters", 1e9),
    )
