"""What the report says about a run whose ranks grow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from salient_ds.config import ConfigError, RunConfig, parse_config
from salient_ds.memory import estimate, workload
from salient_ds.preflight import preflight
from salient_ds.zero.config import DsSummary

ROOT = Path(__file__).resolve().parents[3]
METHOD = {"name": "increlora", "target_rank": 2, "interval": 5, "top_h": 5}


def run_of(tiny_llama: Path, data: Path, tmp_path: Path, **method: Any) -> RunConfig:
    return parse_config({
        "output_dir": str(tmp_path / "run"), "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "model": {"path": str(tiny_llama)}, "adapter": {"rank": 4}, "method": METHOD | method,
        "data": {"train": str(data)},
        "train": {"epochs": 2, "global_batch_size": 8, "micro_batch_size": 2, "lr": 1e-3, "precision": "fp32"},
    })  # fmt: skip


def test_facts(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    report = preflight(run_of(tiny_llama, tiny_alpaca, tmp_path))
    assert report.problems == []
    facts = report.facts
    assert (facts["total_steps"], facts["initial_total"], facts["target_total"]) == (16, 14, 28)
    assert [(e["step"], e["total_rank"]) for e in facts["events"]] == [(6, 19), (11, 24), (16, 28)]
    assert facts["trainable_start"] == 2 * 4 * (64 + 48 + 48 + 64 + 3 * 96 + 7)  # every row that may come
    assert facts["trainable_end"] == facts["trainable_start"] // 2
    assert any("adapter.rank=4 rows per matrix" in note for note in report.notes)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"interval": 8}, "1 growth events"),
        ({"score_reduction": "exact"}, "score_reduction=exact .* 4 micro-batches"),
        ({"top_h": 15}, "top_h=15 is above the 14 adapted matrices"),
        ({"target_rank": 3}, "method.add has no default"),
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
    work = workload(run, 10**6, [(32, 32)] * 14, None, 2)
    assert work.statistics == 4 * work.trainable and work.scoring == 2**30
    small = workload(run_of(tiny_llama, tiny_alpaca, tmp_path, lr_restart=False, block_bytes=1), 10**6,
                     [(32, 32)] * 14, None, 2)  # fmt: skip
    assert small.statistics == 0
    grown = estimate(work, ds, 2).peak - estimate(small, ds, 2).peak
    assert 2**30 - 10**6 < grown <= 2**30 + work.statistics // 2
