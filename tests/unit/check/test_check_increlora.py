"""What the report says about a run whose ranks grow."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from salient_ds.check.memory import Workload, estimate, workload
from salient_ds.check.preflight import preflight
from salient_ds.config.run import RunConfig, parse_config
from salient_ds.strict import ConfigError
from salient_ds.zero.ds_json import DsSummary
from tests.support.layouts import layout_of

ROOT = Path(__file__).resolve().parents[3]
METHOD = {"name": "increlora", "target_rank": 2, "interval": 5, "top_h": 5}


def run_of(
    tiny_llama: Path, data: Path, tmp_path: Path, speed: dict[str, Any] | None = None, **method: Any
) -> RunConfig:
    return parse_config({
        "output_dir": str(tmp_path / "run"), "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "model": {"path": str(tiny_llama)}, "adapter": {"rank": 4}, "method": METHOD | method,
        "data": {"train": str(data)}, "speed": speed or {},
        "train": {"epochs": 2, "global_batch_size": 8, "micro_batch_size": 2, "lr": 1e-3, "precision": "fp32"},
    })  # fmt: skip


def test_facts(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    report = preflight(run_of(tiny_llama, tiny_alpaca, tmp_path, {"growth": "preallocated"}))
    assert report.problems == []
    facts = report.facts
    assert (facts["total_steps"], facts["initial_total"], facts["target_total"]) == (16, 14, 28)
    assert [(e["step"], e["total_rank"]) for e in facts["events"]] == [(6, 19), (11, 24), (16, 28)]
    assert facts["trainable_start"] == 2 * 4 * (64 + 48 + 48 + 64 + 3 * 96 + 7)  # every row that may come
    assert facts["trainable_end"] == facts["trainable_start"] // 2
    assert any("adapter.rank=4 rows per matrix" in note for note in report.notes)
    later = preflight(run_of(tiny_llama, tiny_alpaca, tmp_path))
    assert later.facts["trainable_start"] == facts["trainable_start"] * 3 // 4  # active, in reserve, and one more
    assert any("room for 3 of adapter.rank=4" in note for note in later.notes)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"interval": 8}, "1 growth events"),
        ({"score_reduction": "exact"}, "score_reduction=exact .* 4 micro-batches"),
        ({"top_h": 15}, "top_h=15 is above the 14 adapted matrices"),
        ({"target_rank": 3}, "method.add has no default"),
        ({"start_rank": 5}, "start_rank=5 is above adapter.rank=4"),
    ],
)
def test_problems(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path, method: dict[str, Any], message: str) -> None:
    (problem,) = preflight(run_of(tiny_llama, tiny_alpaca, tmp_path, **method)).problems
    assert re.search(message, problem)


def test_target_above_the_rows(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="method.target_rank=6 is above adapter.rank=4"):
        run_of(tiny_llama, tiny_alpaca, tmp_path, target_rank=6)


def test_scores_are_exact_where_a_step_is_one_pass(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    for reduction, processes, exact in (("exact", 4, True), ("auto", 4, True), ("auto", 2, False), ("mean", 4, False)):
        report = preflight(run_of(tiny_llama, tiny_alpaca, tmp_path, score_reduction=reduction), world_size=processes)
        assert report.problems == [] and report.facts["exact_scores"] is exact
        said = "exact, of the averaged gradient" if exact else "mean, over micro-batches"
        assert f"method.score_reduction={reduction}: scores are {said}" in report.notes


def test_memory(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    """Late rows are copied for a moment, and the blocks of a score come on top of the forward pass."""
    run = run_of(tiny_llama, tiny_alpaca, tmp_path, block_bytes=2**30)
    ds = DsSummary(2, False, False, True, True, 1000, 1000, 1000)
    work = workload(run, 10**6, layout_of((4,) * 14, 32, 32), None, 2)
    assert work.statistics == 4 * work.trainable and work.scoring == 2**30
    small = workload(run_of(tiny_llama, tiny_alpaca, tmp_path, lr_restart=False, block_bytes=1), 10**6,
                     layout_of((4,) * 14, 32, 32), None, 2)  # fmt: skip
    assert small.statistics == 0
    grown = estimate(work, ds, 2).peak - estimate(small, ds, 2).peak
    assert 2**30 - 10**6 < grown <= 2**30 + work.statistics // 2


def test_memory_of_growth_in_flight(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    """The rows that there may be at the most, wherever they go, and everything whole on every process for a moment."""

    def work_of(speed: dict[str, Any] | None, rank: int = 32, **method: Any) -> Workload:
        run = run_of(tiny_llama, tiny_alpaca, tmp_path, speed, **method)
        run = run.model_copy(update={"adapter": run.adapter.model_copy(update={"rank": rank})})
        layout = replace(layout_of((rank,) * 14, 32), out_features=(32,) * 7 + (96,) * 7)
        return workload(run, 10**6, layout, None, 8)

    apart, flight = work_of({"growth": "preallocated"}), work_of({"compaction_multiple": 1})
    assert apart.in_flight is None and flight.at(3) is flight.in_flight and replace(flight, in_flight=None) == apart
    small = flight.at(2)
    # 14 rows to give away: all to the first wide matrix (15 + 1 in reserve + 7), the others keep 1 + 1 + 1
    assert small.trainable == 23 * 129 + 3 * (6 * 129 + 7 * 65) and small.event == 16 * small.trainable
    assert small.statistics == 4 * small.trainable and small.rank == 5
    # in multiples of 8, the default on GPUs: as if each had 7 rows more
    rounded = work_of(None).at(2)
    assert rounded.trainable == 30 * 129 + 10 * (6 * 129 + 7 * 65)
    zero2 = DsSummary(2, False, False, True, True, 1000, 1000, 1000)
    assert estimate(flight, zero2, 1).optimizer == 12 * small.trainable < estimate(apart, zero2, 1).optimizer // 4
    partitioned = work_of({"zero3": "partitioned"})
    assert partitioned.at(3) is partitioned and partitioned.at(2) is not partitioned
    full = work_of(None, rank=4, target_rank=4)
    assert full.at(2).trainable == full.trainable  # never above adapter.rank
