"""What a step sends equals docs/communication.md, on 1, 2 and 4 processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.dist import traffic_worker
from tests.dist.scenario import GLOBAL_BATCH, Case
from tests.support.spawn import spawn
from tests.support.tiny import make_llama

pytestmark = pytest.mark.slow

CASES = {
    "0": Case(0),
    "1": Case(1),
    "2": Case(2),
    "2-bf16": Case(2, "bf16"),
    "sharded": Case(3, speed={"zero3": "sharded_base", "compaction": "none", "growth": "preallocated"}),
}
TARGET = {"target_rank": 2, "initial_warmup": 2}
WINDOWS = {"final_warmup": 2, "window_initial": 3, "window_final": 5}
PACKED = {"zero3": "auto", "compaction": "none", "growth": "preallocated"}
METHODS = {
    "salience": {"name": "salientlora", "score": "salience", **TARGET, **WINDOWS},
    "gate": {"name": "salientlora", **TARGET, **WINDOWS},
    "adalora": {"name": "adalora", "final_warmup": 4, "interval": 2, **TARGET},
    "lora2": {"name": "lora2", "final_warmup": 4, "interval": 2, **TARGET},
    "spectral": {"name": "spectral", "target_rank": 2, "prune_at": [3, 6], "score": "energy"},
    "spectral-gate": {"name": "spectral", "target_rank": 2, "prune_at": [4], "window": 2},
    "increlora": {"name": "increlora", "top_h": 2, "interval": 2, "add": 1, **TARGET},
    "heterolora": {"name": "heterolora", "interval": 4, "interval_unit": "steps", "probe_batches": 3},
    "lora": {"name": "lora"},
}
EXACT = {"adalora", "lora2", "spectral", "increlora", "lora"}
"""Methods whose events send just what their options say; others send at most that much."""
SMALL = 16
"""Bytes: sums of a few numbers are smaller."""


@pytest.fixture(scope="module", params=[1, 2, 4])
def counted(request: pytest.FixtureRequest, tiny_llama: Path) -> tuple[int, dict[str, Any]]:
    return request.param, spawn(request.param, traffic_worker.steps, tiny_llama, CASES)[0]


@pytest.mark.parametrize("name", CASES)
def test_a_step_sends_what_the_formulas_say(counted: tuple[int, dict[str, Any]], name: str) -> None:
    processes, found = counted
    stage = 2 if name == "sharded" else int(name[0])
    width = 2 if name.endswith("bf16") else 4
    accumulation = GLOBAL_BATCH // processes
    elements = found[name]["elements"]
    for event, log in found[name]["rows"][1:]:  # layers are in their buffers after the first
        gradients = [size for kind, size in log if kind == "all_reduce" and size == elements * width]
        assert len(gradients) == (accumulation if stage == 2 else 1)
        gathered = [size for kind, size in log if kind == "parameters"]
        assert sum(gathered) == (sum(found[name]["groups"]) * width if stage and processes > 1 else 0), log
        rest = [(kind, size) for kind, size in log if kind != "parameters" and size not in gradients]
        if not event:
            assert all(kind == "all_reduce" and size <= SMALL for kind, size in rest) and len(rest) <= 4, rest
        elif processes > 1:
            assert ("all_gather", 32) in rest  # digests
            assert sum(size for _, size in rest) < elements * width  # windows and scores, of rows and not of weights


@pytest.fixture(scope="module")
def by_method(tiny_llama: Path) -> dict[str, Any]:
    cases = {name: Case(2, method=method, speed=PACKED) for name, method in METHODS.items()}
    compacted = Case(2, method=METHODS["gate"], speed=PACKED | {"compaction": "last"})
    found: dict[str, Any] = spawn(2, traffic_worker.steps, tiny_llama, cases | {"compacted": compacted}, timeout=280)[0]
    return found


def summed(row: list[tuple[str, int]]) -> int:
    return sum(size for kind, size in row if kind in ("all_reduce", "broadcast"))


@pytest.mark.parametrize("name", METHODS)
def test_an_event_sends_what_the_options_of_its_method_say(by_method: dict[str, Any], name: str) -> None:
    found, said = by_method[name], by_method[name]["said"]
    of_lora = min(summed(row) for _, row in by_method["lora"]["rows"])
    gradients = (found["before"] - by_method["lora"]["before"]) * 4 * GLOBAL_BATCH // 2
    norms = 4 * (len(found["groups"]) - 1)  # a second group has a norm of its own
    usual = [summed(row) - of_lora - gradients - norms for event, row in found["rows"] if not event]
    events = [summed(row) - of_lora - gradients - norms for event, row in found["rows"] if event]
    assert set(usual) <= {0, said["step"]} and bool(events) == (name != "lora")
    assert set(usual) == {said["step"]} or name == "spectral-gate", "in its window only"
    for size in events:
        assert size - said["step"] <= said["event"]
        if name in EXACT:
            assert size - said["step"] == said["event"]
    assert said["event"] <= 3 * max([*events, 0])


def test_no_step_depends_on_rows_that_were_dropped(by_method: dict[str, Any]) -> None:
    found = by_method["compacted"]
    assert found["elements"] < found["before"]
    event, last = found["rows"][-1]
    sizes = [size for kind, size in last if kind == "all_reduce"]
    assert not event and max(sizes) == 4 * found["elements"] and 4 * found["before"] not in sizes


@pytest.mark.parametrize("processes", [2, 4])
def test_layers_of_the_base_are_gathered_as_often_as_the_formula_says(tmp_path: Path, processes: int) -> None:
    layers = 5
    model = make_llama(tmp_path / "deep", layers=layers)
    case = Case(3, method={"name": "lora"}, speed={"zero3": "sharded_base", "compaction": "none"})
    found = spawn(processes, traffic_worker.steps, model, {"deep": case}, timeout=120)[0]["deep"]
    for _, row in found["rows"][1:]:  # before the first step no layer is in a buffer
        gathered = [size for kind, size in row if kind == "layer"]
        assert len(gathered) == GLOBAL_BATCH // processes * 2 * (layers - 2)
        whole = processes * gathered[0]
        assert whole == pytest.approx(_bytes_of_a_layer(model), rel=0.06)  # parts are rounded up


def _bytes_of_a_layer(model: Path) -> int:
    from safetensors import safe_open

    with safe_open(model / "model.safetensors", "pt") as file:
        names = [name for name in file.keys() if ".layers.0." in name]  # noqa: SIM118
        return sum(4 * file.get_tensor(name).numel() for name in names)
