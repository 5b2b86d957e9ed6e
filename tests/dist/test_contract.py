"""The attributes of DeepSpeed that nothing promises are where zero/internals/contract.py says, in real engines.

A failure is a sentence that names the attribute: read DeepSpeed's changes about it, then adapt zero/internals.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from salient_ds.zero.internals import contract
from tests.dist import scenario
from tests.dist.scenario import Case
from tests.support.spawn import spawn

PARTITIONED = {"zero3": "partitioned", "compaction": "none"}
CASES = {
    "zero0-fp32": (Case(0), None),
    "zero0-bf16": (Case(0, "bf16"), "FP16_UnfusedOptimizer"),
    "zero1-bf16": (Case(1, "bf16"), "DeepSpeedZeroOptimizer"),
    "zero2-fp32": (Case(2), "DeepSpeedZeroOptimizer"),
    "zero3-fp32": (Case(3, speed=PARTITIONED), "DeepSpeedZeroOptimizer_Stage3"),
}
"""A run, and the class of the optimizer that DeepSpeed makes for it (None: the basic one itself)."""


class _Lacking:
    """An object without one of its attributes."""

    def __init__(self, real: Any, name: str) -> None:
        self._real, self._name = real, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise AttributeError(name)
        return getattr(self._real, name)


def _look(global_rank: int, world_size: int, model: Path) -> dict[str, Any]:
    """By case: the optimizer's class, what engine and parameters lack, and what is said of a planted loss.

    "limits": time limits of all process groups in the end, in seconds.
    """
    found: dict[str, Any] = {}
    for name, (case, _) in CASES.items():
        engine = scenario.build(case, model, world_size).engine
        kind = type(engine.optimizer).__name__
        parameter = next(p for p in engine.module.parameters() if p.requires_grad)
        partitioned = [n for n in contract.PARAMETER if case.stage == 3 and not hasattr(parameter, n)]
        planted: list[str] = []
        for attribute in ("micro_steps", *contract.WRAPPERS.get(kind, ())[:1]):
            owner = engine if attribute == "micro_steps" else engine.optimizer
            lacking = _Lacking(owner, attribute)
            lacking.__class__ = type(type(owner).__name__, (_Lacking,), {})
            whole = lacking if owner is engine else _Lacking(engine, "")
            if owner is not engine:
                whole.optimizer = lacking  # type: ignore[attr-defined]
            planted += contract.missing(whole)
        found[name] = (kind, contract.missing(engine), partitioned, planted)
        engine.destroy()
    limits = [group._get_backend(torch.device("cpu")).options._timeout for group in distributed_c10d._world.pg_map]
    found["limits"] = [limit.total_seconds() for limit in limits]
    return found


@pytest.fixture(scope="module")
def looked(tiny_llama: Path) -> Any:
    return spawn(1, _look, tiny_llama)[0]


@pytest.mark.parametrize("name", CASES)
def test_deepspeed_keeps_what_is_read(looked: Any, name: str) -> None:
    kind, engine, parameter, _ = looked[name]
    assert engine == [] and parameter == []
    assert CASES[name][1] in (None, kind), f"DeepSpeed makes a {kind} here now: does layouts.py know it?"


def test_the_time_limit_holds_for_every_group(looked: Any) -> None:
    """DeepSpeed makes a clone of the world group, with torch's 30 minutes if nobody is before it."""
    assert len(looked["limits"]) > 1
    assert set(looked["limits"]) == {180.0}  # as tests/support/spawn.py starts them


@pytest.mark.parametrize("name", CASES)
def test_an_attribute_that_has_moved_is_named(looked: Any, name: str) -> None:
    kind, _, _, planted = looked[name]
    assert planted[0] == "DeepSpeed's DeepSpeedEngine has no attribute 'micro_steps' any more, which salient_ds reads"
    for attribute in contract.WRAPPERS.get(kind, ())[:1]:
        assert planted[1] == f"DeepSpeed's {kind} has no attribute {attribute!r} any more, which salient_ds reads"
