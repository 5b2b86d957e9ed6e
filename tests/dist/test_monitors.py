"""Logs of a run whose engine is built anew, and which is resumed: one file, one header, every step once, true rates."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from salient_ds.monitor.metrics import read_metrics
from salient_ds.monitor.run_facts import gather
from tests.dist import monitor_worker
from tests.launcher.runs import write_run
from tests.support.spawn import spawn

PEAK = 1e12
STEPS, CRASH = 24, 17
"""The crash comes two steps after the checkpoint of step 15, which the resumed run takes again."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_alpaca: Path) -> tuple[Path, list[Any]]:
    folder = tmp_path_factory.mktemp("monitors")
    zero = json.loads((Path(__file__).parents[2] / "ds_configs" / "cpu.json").read_text())
    (folder / "zero.json").write_text(
        json.dumps(zero | {"csv_monitor": {"enabled": True}, "tensorboard": {"enabled": True}})
    )
    path = write_run(
        folder, tiny_llama, tiny_alpaca, deepspeed=str(folder / "zero.json"), speed={"compaction": "every"},
        train={"log": ["csv", "tensorboard"], "eval_every": 10, "lr_warmup": 4, "peak_tflops": PEAK / 1e12},
    )  # fmt: skip
    first = spawn(1, monitor_worker.run, path, "never", CRASH)[0]
    second = spawn(1, monitor_worker.run, path, "auto", None)[0]
    return folder / "run", [first, second]


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_the_engine_was_built_anew(run: tuple[Path, list[Any]]) -> None:
    assert run[1][0]["engines"] > 1


def test_our_csv(run: tuple[Path, list[Any]]) -> None:
    header, *lines = rows(run[0] / "log.csv")
    assert [int(line[0]) for line in lines] == list(range(1, STEPS + 1))
    assert len({len(line) for line in lines}) == 1 and len(set(header)) == len(header)
    table = [dict(zip(header, line, strict=True)) for line in lines]
    logged = {row["step"]: row for row in read_metrics(run[0] / "metrics.jsonl") if "loss" in row}
    for row in table:
        for key in ("loss", "grad_norm", "lr", "total_rank", "tokens_per_second", "memory", "mfu"):
            assert float(row[key]) == logged[int(row["step"])][key], (row["step"], key)
    assert [row["step"] for row in table if row["eval_loss"]] == ["10", "20", "24"]
    events = [json.loads(line)["step"] for line in (run[0] / "allocations.jsonl").read_text().splitlines()]
    assert [int(row["step"]) for row in table if row["event/changed"]] == events


def test_deepspeeds_csv_has_one_header_and_every_step_once(run: tuple[Path, list[Any]]) -> None:
    files = sorted((run[0] / "monitor" / "run").glob("*.csv"))
    assert {path.stem for path in files} >= {"Train_loss", "Train_total_rank", "Eval_loss"}
    for path in files:
        header, *lines = rows(path)
        assert header[0] == "step" and all(line[0].isdigit() for line in lines), path.name
        samples = [int(line[0]) for line in lines]
        assert samples == sorted(set(samples)), path.name
    assert len(rows(run[0] / "monitor" / "run" / "Train_loss.csv")) == 1 + STEPS


def test_tensorboard(run: tuple[Path, list[Any]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run[0] / "tensorboard"
    assert len(list(folder.iterdir())) == 2, "one file per start, not per engine"
    read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == list(range(1, STEPS + 1))
    logged = {row["step"]: row["loss"] for row in read_metrics(run[0] / "metrics.jsonl") if "loss" in row}
    assert [event.value for event in read.Scalars("loss")] == pytest.approx(list(logged.values()))
    assert "ranks" in read.Tags()["histograms"] and any("run file" in tag for tag in read.Tags()["tensors"])
    assert len(list((run[0] / "monitor" / "run").glob("events.*"))) == 2  # DeepSpeed's own: one per start too


def test_rates_are_those_of_their_step(run: tuple[Path, list[Any]]) -> None:
    rates = run[1][0]["rates"] | run[1][1]["rates"]
    logged = {row["step"]: row["lr"] for row in read_metrics(run[0] / "metrics.jsonl") if "loss" in row}
    assert logged == pytest.approx(rates) and len(rates) == STEPS
    assert logged[1] == 0 and logged[5] == max(logged.values()) and logged[STEPS] > 0  # four steps of warm-up


def test_mfu_is_operations_over_the_peak(run: tuple[Path, list[Any]]) -> None:
    logged = [row for row in read_metrics(run[0] / "metrics.jsonl") if "loss" in row]
    weights = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64) + 192 * 32  # two layers and the head
    for row in logged:
        tokens = row["tokens_per_second"] * row["seconds"]
        per_token = row["mfu"] * row["seconds"] * PEAK / tokens
        adapters = 6 * row["total_rank"] * 96  # a row has at most 32 + 64 numbers
        attention = 2 * 12 * 32 * 80  # at most 160 tokens, half of which are seen
        assert 4 * weights < per_token < 4 * weights + adapters + attention, row["step"]


def test_what_a_report_finds(run: tuple[Path, list[Any]]) -> None:
    found = gather(run[0])
    assert found.problems == []
    assert found.start_ranks() == [8] * 14
    assert found.facts["environment"]["torch"] and found.facts["data"]["items held out"] == 8
    assert len(found.series("memory")[0]) == STEPS and min(found.series("memory")[1]) > 2**20
