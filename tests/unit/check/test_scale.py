"""``check --nodes``: the model's bytes are the formulas, and its seconds follow from the assumptions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from salient_ds.check.printing import run_check
from salient_ds.check.scale import SIZES, Cluster, Traffic, Work, rows, size

P = 1_000_000
WORK = Work(
    stage=2, sharded_base=False, elements=P, element_bytes=2, base_parameters=10**9, layer_bytes=4_000_000, layers=12,
    bucket=200_000, step_sums=lambda accumulation: 0, event_sums=8_000, rows=1_000, flops=450e12, micro_batch=4,
)  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "sharded", "accumulation", "summed", "gathered"),
    [
        (0, False, 3, 2 * P, 0),
        (1, False, 3, 2 * P, 2 * P),
        (2, False, 3, 6 * P, 2 * P),
        (3, True, 1, 2 * P, 2 * P + 20 * 4_000_000),
        (3, True, 2, 4 * P, 2 * P + 40 * 4_000_000),
        (3, False, 1, 2 * P, 2 * P + 24 * 4_000_000),
    ],
)
def test_a_step_sends_gradients_parameters_and_layers(
    stage: int, sharded: bool, accumulation: int, summed: int, gathered: int
) -> None:
    found = replace(WORK, stage=stage, sharded_base=sharded).step(accumulation)
    assert (found.summed - 24, found.gathered) == (summed, gathered)


def test_a_ring_sends_sums_twice_and_gathers_once() -> None:
    assert Traffic(1000, 400, 1).sent(1) == 0
    assert Traffic(1000, 400, 1).sent(4) == 0.75 * (2000 + 400)


def test_seconds_follow_from_the_assumptions() -> None:
    cluster = Cluster(gpus_per_node=8, rate=450e12, inside=1e9, between=1e8, latency=1e-3)
    assert cluster.seconds(1e9, 1) == 0
    assert cluster.seconds(1e9, 8) == pytest.approx(1 + 2 * 3 * 1e-3)
    assert cluster.seconds(1e9, 16, calls=2) == pytest.approx(10 + 2 * 2 * 4 * 1e-3)
    (one, *_, most) = rows(WORK, cluster, processes=1, accumulation=8, nodes=2)
    assert (one.gpus, one.global_batch, one.step_seconds, one.waiting) == (1, 32, pytest.approx(8.0), 0.0)
    assert most.gpus == 4096 and most.step_seconds > 1 and 0 < most.waiting < 1
    assert most.event_seconds > one.event_seconds > 0


def test_the_table_has_the_sizes_the_nodes_and_the_run() -> None:
    found = rows(WORK, Cluster(gpus_per_node=4), processes=64, accumulation=2, nodes=3)
    assert [row.gpus for row in found] == sorted({*SIZES, 12, 64})
    assert {row.gpus: row.global_batch for row in found}[64] == 64 * 2 * 4


def test_a_method_without_events_has_none() -> None:
    found = rows(replace(WORK, event_sums=0), Cluster(latency=0.0), 1, 1, 1)
    assert found[0].event_seconds == 0 and all(row.event_seconds < 1e-6 for row in found)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1_234, "1.23 kB"), (7.08e9, "7.08 GB"), (2e6, "2 MB")])
def test_sizes_are_short(count: float, text: str) -> None:
    assert size(count) == text


def test_check_prints_the_table(
    tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = {
        "output_dir": str(tmp_path / "out"), "deepspeed": "ds_configs/zero2.json", "model": {"path": str(tiny_llama)},
        "adapter": {"rank": 4, "alpha": 8}, "method": {"name": "adalora", "target_rank": 2},
        "data": {"train": str(tiny_alpaca), "max_length": 128},
        "train": {"max_steps": 20, "global_batch_size": 2, "micro_batch_size": 2, "lr": 1e-3},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    assert run_check(str(path), nodes=64) == 0
    shown = capsys.readouterr().out
    assert "a model of larger numbers of GPUs (not a measurement)" in shown and "4,096" in shown and "512" in shown
    assert run_check(str(path)) == 0
    assert "larger numbers" not in capsys.readouterr().out
