"""Runs on tasks, from rows to metrics, best checkpoint and evaluation: the same on one, two and four processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salient_ds.engine.shard_files import find_checkpoints
from salient_ds.run.export import export_run
from tests.dist import tasks_worker
from tests.dist.tasks_worker import TASKS, settings
from tests.support.spawn import spawn
from tests.support.tiny_heads import add_tokenizer, make_base, write_rows

RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "classes": ("roberta", "sequence-classification", {}),
    "numbers": ("bert", "regression", {"stage": 0}),
    "answers": ("bert", "question-answering", {"method": {"name": "lora"}}),
    "texts-3": ("t5", "seq2seq-lm", {"stage": 3, "method": {"name": "lora"}}),
    "decoder": ("llama", "sequence-classification", {"best_metric": "loss"}),
}
EVALUATED = 11
"""Rows of the held-out data: no multiple of processes times batch."""
each = pytest.mark.parametrize("name", RUNS)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    for kind in {kind for kind, _, _ in RUNS.values()}:
        add_tokenizer(make_base(folder / kind, kind))
    write_rows(folder / "train.jsonl", 24)
    write_rows(folder / "eval.jsonl", EVALUATED, seed=1)
    return folder


def runs(place: Path, processes: str) -> dict[str, dict[str, Any]]:
    data = place / "train.jsonl", place / "eval.jsonl"
    (place / processes).mkdir(exist_ok=True)
    return {name: settings(kind, task, place / kind, data, place / processes / name, **dict(more))
            for name, (kind, task, more) in RUNS.items()}  # fmt: skip


@pytest.fixture(scope="module")
def two(place: Path) -> list[Any]:
    return spawn(2, tasks_worker.run, runs(place, "two"))


@pytest.fixture(scope="module")
def one(place: Path) -> Any:
    return spawn(1, tasks_worker.run, runs(place, "one"))[0]


@pytest.fixture(scope="module")
def scored(place: Path, two: list[Any]) -> dict[str, Any]:
    """Evaluations of the finished runs, and of other forms of the same, by number of processes."""
    merged = export_run(place / "two" / "classes", "merged", place / "merged")
    jobs: dict[str, Any] = {name: (str(place / "two" / name), {}) for name in RUNS}
    jobs["adapter"] = (str(place / "two" / "classes" / "adapter"), {"data": str(place / "eval.jsonl")})
    jobs["merged"] = (str(merged), {"data": str(place / "eval.jsonl")})
    return {str(n): spawn(n, tasks_worker.evaluate, jobs, place / f"out-{n}") for n in (4, 2, 1)}


@each
def test_metrics_do_not_depend_on_the_number_of_processes(two: list[Any], one: Any, name: str) -> None:
    assert two[0][name] == two[1][name]
    assert two[0][name]["values"] == pytest.approx(one[name]["values"], rel=2e-3, abs=1e-6)
    metrics = TASKS[RUNS[name][1]].get("metrics", ())
    assert {"loss", *metrics} <= two[0][name]["values"].keys()


@each
def test_the_best_checkpoint_is_kept_and_exported(place: Path, two: list[Any], name: str) -> None:
    folder, best = place / "two" / name, two[0][name]["best"]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["speed"]["adapters"] == summary["speed"]["fused_adapters"] > 0, "facts of the run"
    assert summary["best"] == best and summary["evaluation"] == two[0][name]["values"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seen = {line["step"]: line[f"eval_{best['metric']}"] for line in lines if f"eval_{best['metric']}" in line}
    assert sorted(seen) == [2, 4, 6]
    final = {step: value for step, value in seen.items() if step >= (2 if RUNS[name][2].get("method") is None else 0)}
    wanted = (min if best["metric"] == "loss" else max)(final.values())
    assert best["value"] == wanted == final[best["step"]]
    kept = {path.name for path in find_checkpoints(folder / "checkpoints")}
    assert kept >= {f"step-{best['step']:08d}", "step-00000006"} and len(kept) <= 2
    record = json.loads((folder / "adapter" / "salient_ds.json").read_text())
    assert record["source_run"].endswith(f"step-{best['step']:08d}")


@each
def test_evaluate_finds_what_training_found(place: Path, two: list[Any], scored: dict[str, Any], name: str) -> None:
    best = two[0][name]["best"]
    lines = [json.loads(line) for line in (place / "two" / name / "metrics.jsonl").read_text().splitlines()]
    (then,) = [line for line in lines if line["step"] == best["step"] and "eval_loss" in line]
    for reports in scored.values():
        assert all(report[name]["values"]["loss"] == pytest.approx(then["eval_loss"], rel=1e-4) for report in reports)
        if name == "numbers":  # ranks of numbers that are almost equal: rounding decides them
            continue
        assert all(report[name]["values"][best["metric"]] == pytest.approx(best["value"], rel=1e-5)
                   for report in reports)  # fmt: skip
    lines, *others = ((place / f"out-{n}" / name / "predictions.jsonl").read_text().splitlines() for n in (1, 2, 4))
    wanted, *values = [[json.loads(line)["prediction"] for line in found] for found in (lines, *others)]
    for found in values:
        assert found == (pytest.approx(wanted, rel=1e-4) if name == "numbers" else wanted)
    assert len(lines) == EVALUATED and {"id", "label", "prediction", "score"} <= json.loads(lines[0]).keys()


def test_evaluate_refuses_processes_that_read_other_rows(scored: dict[str, Any]) -> None:
    for processes, reports in scored.items():
        for report in reports:
            assert report["differing"] == reports[0]["differing"]
            assert ("rows is" in report["differing"]) == (processes != "1")


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_adapter_and_merged_model_score_the_same(scored: dict[str, Any], form: str) -> None:
    for reports in scored.values():
        assert reports[0][form]["values"] == pytest.approx(reports[0]["classes"]["values"], rel=1e-4)


def test_patience_ends_a_run_and_resuming_changes_nothing(place: Path) -> None:
    """With a rate of almost zero no evaluation is better than the first one that counts."""
    values = runs(place, "early")["classes"]
    values["train"] |= {"lr": 1e-12, "patience": 1, "max_steps": 40, "eval_every": 1}
    values["method"] = {"name": "lora"}
    found = spawn(1, tasks_worker.run, {"early": values})[0]["early"]
    assert (found["step"], found["best"]["step"], found["best"]["since"]) == (2, 1, 2)  # the last evaluation counts too
    (note,) = spawn(1, tasks_worker.run, {"early": values}, "auto")[0]["early"]["notes"]
    assert "it stopped early, after step 2" in note


def test_resumed_runs_remember_the_best(place: Path, two: list[Any]) -> None:
    """From the checkpoint of the best step, the rest of the run is taken again, with the same outcome."""
    name = next(name for name in RUNS if two[0][name]["best"]["step"] < 6)
    folder, best = place / "two" / name, two[0][name]["best"]
    start = str(folder / "checkpoints" / f"step-{best['step']:08d}")
    again = spawn(2, tasks_worker.run, {name: runs(place, "two")[name]}, start)
    assert again[0][name]["best"] == best
    assert again[0][name]["values"] == two[0][name]["values"]
