"""Section ``speed``: contradictions are found before anything starts, and memory follows the layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from salient_ds.memory import estimate
from salient_ds.speed_config import SpeedConfig, packs, shards_base, speed_problems
from tests.unit.check.test_memory import config, work


@pytest.mark.parametrize(
    ("options", "method", "stage", "expected"),
    [
        ({"packing": "layer", "zero3": "partitioned"}, "salientlora", 3, "packing=layer cannot be had .*partitioned"),
        ({"packing": "layer"}, "heterolora", 2, "not with heterolora"),
        ({"zero3": "sharded_base", "packing": "none"}, "salientlora", 3, "zero3=sharded_base needs packed"),
        ({"compaction": "last", "packing": "none"}, "salientlora", 2, "compaction=last needs packed"),
        ({"compaction": "every"}, "adalora", 2, "compaction=every works with salientlora, not with adalora"),
        ({"compile_layers": True}, "salientlora", 3, "compile_layers does not work with ZeRO-3"),
    ],
)  # fmt: skip
def test_contradictions_are_named_with_the_way_out(
    options: dict[str, object], method: str, stage: int, expected: str
) -> None:
    (problem,) = speed_problems(SpeedConfig.model_validate(options), method, stage)
    import re

    assert re.search(expected, problem) and "use" in problem


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["salientlora", "adalora", "lora", "lora2", "increlora", "heterolora"])
def test_defaults_contradict_nothing(method: str, stage: int) -> None:
    assert speed_problems(SpeedConfig(), method, stage) == []
    assert packs(SpeedConfig(), method, stage) == (method != "heterolora")
    assert shards_base(SpeedConfig(), method, stage) == (method != "heterolora" and stage == 3)


def test_shortcuts_keep_parameters_apart() -> None:
    assert not packs(SpeedConfig(), "lora", 2, shortcuts=True)
    assert not shards_base(SpeedConfig(), "lora", 3, shortcuts=True)


def test_a_sharded_base_replicates_the_adapters_and_nothing_else() -> None:
    apart = estimate(work(rank=480), config(3), 8)
    shared = estimate(replace(work(rank=480), sharded_base=True), config(3), 8)
    assert shared.adapters == 8 * apart.adapters
    assert (shared.base, shared.optimizer, shared.gradients) == (apart.base, apart.optimizer, apart.gradients)
    assert estimate(replace(work(), sharded_base=True), config(2), 8) == estimate(work(), config(2), 8)
