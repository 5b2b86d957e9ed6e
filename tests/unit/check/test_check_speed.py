"""Section ``speed``: contradictions are found before anything starts, and memory follows the layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from salient_ds.check.memory import estimate
from salient_ds.config.run import RunConfig, parse_config
from salient_ds.config.speed import SpeedConfig, compiles, row_multiple, speed_notes, speed_plan, speed_problems
from salient_ds.methods.options import MethodConfig
from salient_ds.strict import ConfigError
from tests.support.methods import OPTIONS
from tests.unit.check.test_memory import config, work


@pytest.mark.parametrize(
    ("options", "method", "stage", "expected"),
    [
        ({"packing": "layer", "zero3": "partitioned"}, "salientlora", 3, "packing=layer cannot be had .*partitioned"),
        ({"zero3": "sharded_base", "packing": "none"}, "salientlora", 3, "zero3=sharded_base needs packed"),
        ({"compaction": "last", "packing": "none"}, "salientlora", 2, "compaction=last needs packed"),
        ({"growth": "in_flight"}, "salientlora", 2, "growth=in_flight works with methods .*, not with salientlora"),
        ({"growth": "in_flight", "zero3": "partitioned"}, "increlora", 3, "growth=in_flight needs packed adapters"),
        ({"compaction": "every"}, "adalora", 2, "compaction=every works with salientlora, spectral, not with adalora"),
        ({"compile_layers": True, "zero3": "partitioned"}, "lora", 3, "compile_layers does not work .*partitioned"),
        ({"cuda_graphs": True}, "lora", 3, "cuda_graphs=true does not work at ZeRO-3"),
        ({"cuda_graphs": True, "packing": "none"}, "lora", 2, "cuda_graphs=true needs packed"),
        ({"cuda_graphs": True}, "increlora", 2, "cuda_graphs=true launches compiled layers, .*method increlora"),
        ({"cuda_graphs": True, "compile_layers": False}, "salientlora", 2, "compile_layers=False, .* rule out"),
    ],
)  # fmt: skip
def test_contradictions_are_named_with_the_way_out(
    options: dict[str, object], method: str, stage: int, expected: str
) -> None:
    (problem,) = speed_problems(SpeedConfig.model_validate(options), OPTIONS[method], stage)
    import re

    assert re.search(expected, problem) and "use" in problem


def test_graphs_want_packed_rows() -> None:
    graphs = SpeedConfig(cuda_graphs=True)
    (note,) = speed_notes(graphs, OPTIONS["salientlora"], 2, False, True, packed=False)
    assert "data.packing=true" in note
    assert speed_notes(graphs, OPTIONS["salientlora"], 2, False, True, packed=True) == []


@pytest.mark.parametrize(
    ("options", "method", "on_gpu", "expected"),
    [
        ({}, "salientlora", True, True),
        ({}, "salientlora", False, False),
        ({}, "increlora", True, False),
        ({}, "lora2", True, True),
        ({}, "heterolora", True, True),
        ({"liger": "all"}, "lora", True, False),
        ({"compile_layers": True}, "increlora", False, True),
        ({"compile_layers": False}, "salientlora", True, False),
    ],
)
def test_layers_are_compiled_unasked_only_where_that_is_known_to_work(
    options: dict[str, object], method: str, on_gpu: bool, expected: bool
) -> None:
    assert compiles(SpeedConfig.model_validate(options), OPTIONS[method], True, on_gpu) == expected
    assert not compiles(SpeedConfig(), OPTIONS[method], False, on_gpu)


def test_layers_whose_weights_are_replaced_are_not_compiled() -> None:
    synflow = OPTIONS["heterolora"].model_copy(update={"proxy": "synflow"})
    assert synflow.replaces_weights and not compiles(SpeedConfig(), synflow, True, True)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("method", ["salientlora", "adalora", "lora", "lora2", "increlora", "heterolora"])
def test_defaults_contradict_nothing(method: str, stage: int) -> None:
    assert speed_problems(SpeedConfig(), OPTIONS[method], stage) == []
    plan = speed_plan(SpeedConfig(), OPTIONS[method], stage)
    assert plan.packed and plan.sharded_base == (stage == 3)
    assert plan.grows_in_flight == (method == "increlora")


def test_a_method_that_does_not_declare_packing_is_named() -> None:
    class Apart(MethodConfig):
        name: str = "apart"

    (problem,) = speed_problems(SpeedConfig(packing="layer"), Apart(), 2)
    assert "packing=layer cannot be had (not with apart)" in problem
    assert not speed_plan(SpeedConfig(), Apart(), 2).packed
    assert any("apart does not declare packing" in note for note in speed_notes(SpeedConfig(), Apart(), 2, False, True))


def test_shortcuts_keep_parameters_apart() -> None:
    for stage in (2, 3):
        plan = speed_plan(SpeedConfig(), OPTIONS["lora"], stage, shortcuts=True)
        assert not plan.packed and not plan.sharded_base


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"preset": "reference"}, ["apply_at=next_step", "pruned_vectors=train", "nan_scores=reference"]),
        ({"apply_at": "next_step"}, ["apply_at=next_step"]),
        ({"pruned_vectors": "train"}, ["pruned_vectors=train"]),
        ({"nan_scores": "reference"}, ["nan_scores=reference"]),
    ],
)
def test_rows_that_matter_to_later_events_are_not_dropped_between_them(
    options: dict[str, str], named: list[str]
) -> None:
    def changed(compaction: str, **method: str) -> RunConfig:
        return parse_config({
            "output_dir": "unused", "deepspeed": "unused", "model": {"path": "unused"}, "data": {"train": "unused"},
            "adapter": {"rank": 8, "alpha": 8}, "method": {"name": "salientlora", "target_rank": 4, **method},
            "train": {"max_steps": 10, "global_batch_size": 1, "micro_batch_size": 1, "lr": 0.1},
            "speed": {"compaction": compaction},
        })  # fmt: skip

    changed("last", **options)
    changed("every")
    with pytest.raises(ConfigError) as caught:
        changed("every", **options)
    (problem,) = caught.value.problems
    assert all(f"method.{one}" in problem for one in named) and "use last" in problem
    for one in ("apply_at=now", "pruned_vectors=zero", "nan_scores=zero"):
        assert (f"method.{one}" in problem) == any(one.split("=")[0] in found for found in named)


def test_compacted_ranks_suit_the_device() -> None:
    assert (row_multiple(SpeedConfig(), on_gpu=True), row_multiple(SpeedConfig(), on_gpu=False)) == (8, 1)
    assert row_multiple(SpeedConfig(compaction_multiple=3), on_gpu=True) == 3
    with pytest.raises(ValueError, match="compaction_multiple"):
        SpeedConfig(compaction_multiple=0)


def test_a_sharded_base_replicates_adapters_and_what_is_outside_the_layers() -> None:
    apart = estimate(work(rank=480), config(3), 8)
    shared = estimate(replace(work(rank=480), sharded_base=True), config(3), 8)
    assert shared.adapters == 8 * apart.adapters
    assert (shared.optimizer, shared.gradients) == (apart.optimizer, apart.gradients)
    embeddings = 2 * (2 * 32000 * 4096)  # bytes of embedding and head
    norms = 2 * (2 * 32 + 1) * 4096
    assert 0 <= shared.base - apart.base - embeddings * 7 // 8 <= norms
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert shared.buffers == 2 * layer + 2 * 500_000_000
    assert estimate(replace(work(), sharded_base=True), config(2), 8) == estimate(work(), config(2), 8)
