"""A worker trains a whole sweep in one process, and its runs equal those of processes of their own."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from salient_ds.config.run import load_config
from salient_ds.monitor.metrics import read_metrics
from salient_ds.strict import ConfigError
from salient_ds.sweep.arms import arm_runs, fingerprint
from salient_ds.sweep.folder import SweepFolder
from salient_ds.sweep.one_run import leaves_traces
from salient_ds.sweep.plan import Job, Outcome
from salient_ds.sweep.report import write_report
from salient_ds.sweep.spec import SweepSpec, load_spec
from salient_ds.sweep.worker import ATTEMPTS, Worker
from tests.support.spawn import spawn_apart
from tests.unit.sweep.sweep_helpers import write_run

ARMS: dict[str, Any] = {
    "lora": {"method.name": "lora", "adapter.rank": 3},
    "salient": {},
    "increlora": ["method={name: increlora, target_rank: 2, initial_warmup: 1, interval: 1, top_h: 2}", "lr=[1e-2]"],
}


def prepare(folder: Path, model: Path, data: Path, **changes: Any) -> Path:
    write_run(folder, model, data)
    given: dict[str, Any] = {
        "run": "run.yaml", "output_dir": str(folder / "out"), "arms": ARMS, "lr": [1e-3, 1e-2],
        "seeds": {"tune": [0], "fresh": [1]},
    }  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(given | changes))
    return path


def begun(path: Path) -> tuple[SweepSpec, SweepFolder, Mapping[str, Any]]:
    spec = load_spec(path)
    runs = arm_runs(spec, path)
    folder = SweepFolder(Path(spec.output_dir))
    folder.begin({name: fingerprint(run) for name, run in runs.items()}, [], [])
    return spec, folder, runs


def work(rank: int, world: int, path: Path) -> tuple[int, list[str]]:
    """Exit status of a worker, and what of its runs is still in memory."""
    spec = load_spec(path)
    status = Worker(spec, path, SweepFolder(Path(spec.output_dir))).work()
    gc.collect()
    heavy = ("Training", "AllocatingEngine", "DeepSpeedEngine", "LlamaForCausalLM")
    return status, [type(thing).__name__ for thing in gc.get_objects() if type(thing).__name__ in heavy]


def alone(rank: int, world: int, run_file: Path, target: Path) -> None:
    from salient_ds.run.training import Training

    config = load_config(run_file, [f"output_dir={target}"])
    Training(config, torch.device("cpu")).run("never", overwrite=False)


def numbers(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock measured, and the memory of the process."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in row.items() if "second" not in key and key != "memory"} for row in rows]


def test_a_sweep_in_one_process(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> None:
    path = prepare(tmp_path, tiny_llama, tiny_alpaca)
    spec, folder, runs = begun(path)
    assert spawn_apart(work, (path,)) == [(0, [])]
    outcomes = folder.outcomes()
    assert {outcome.status for outcome in outcomes.values()} == {"finished"} and len(outcomes) == 5 + 3
    result = write_report(spec, folder, runs)
    assert result["complete"] and not result["failed"]
    for arm in result["arms"]:
        assert arm["total_rank"] > 0 and arm["trainable"] > 0 and arm["fresh"]["n"] == 1
    fresh = [outcome for outcome in outcomes.values() if outcome.phase == "fresh"]
    jobs = [Job(o.arm, o.lr, o.seed, o.phase) for o in fresh]
    spawn_apart(alone, *((folder.run_file(job), tmp_path / job.arm) for job in jobs))
    for job, outcome in zip(jobs, fresh, strict=True):
        here, there = folder.run_directory(job), tmp_path / job.arm
        assert numbers(here) == numbers(there)
        weights = [(place / "adapter" / "adapter_model.safetensors").read_bytes() for place in (here, there)]
        assert weights[0] == weights[1]
        assert outcome.metrics["loss"] == numbers(here)[-1]["eval_loss"]


def test_a_run_that_kills_its_process_is_given_up(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> None:
    path = prepare(tmp_path, tiny_llama, tiny_alpaca, arms={"lora": {}}, lr=[1e-3])
    spec, folder, _ = begun(path)
    for _ in range(ATTEMPTS):
        claim = folder.queue().claim("lora~lr-0.001~seed-0")
        assert claim is not None
        os.utime(claim.path, (time.time() - 1000,) * 2)
    worker = Worker(spec, path, folder)
    assert worker.work() == 0
    (outcome,) = folder.outcomes().values()
    assert outcome.status == "failed" and f"ended {ATTEMPTS} times without an answer" in outcome.reason


def test_a_worker_of_other_arms_is_refused(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> None:
    path = prepare(tmp_path, tiny_llama, tiny_alpaca)
    spec = load_spec(path)
    with pytest.raises(ConfigError, match="start salient-ds sweep without --worker first"):
        Worker(spec, path, SweepFolder(Path(spec.output_dir)))
    begun(path)
    Worker(spec, path, SweepFolder(Path(spec.output_dir)))
    other = load_spec(prepare(tmp_path, tiny_llama, tiny_alpaca, arms=ARMS | {"lora": {"adapter.rank": 1}}))
    with pytest.raises(ConfigError, match="was not started with these arms"):
        Worker(other, path, SweepFolder(Path(other.output_dir)))


def test_which_runs_leave_traces(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> None:
    run = write_run(tmp_path, tiny_llama, tiny_alpaca, lr=1e-3)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not leaves_traces(load_config(run), cpu) and leaves_traces(load_config(run), gpu)
    assert not leaves_traces(load_config(run, ["speed.compile_layers=false"]), gpu)
    assert leaves_traces(load_config(run, ["speed.compile_layers=true"]), cpu)
    assert leaves_traces(load_config(run, ["speed.liger=loss"]), cpu)
    zero3 = Path(__file__).resolve().parents[3] / "ds_configs" / "zero3.json"
    assert leaves_traces(load_config(run, [f"deepspeed={zero3}"]), cpu)


def test_outcomes_that_are_not_whole_are_left_out(tmp_path: Path) -> None:
    folder = SweepFolder(tmp_path)
    folder.begin({}, [], [])
    folder.put(Outcome("a", 1e-3, 0, "tune", "finished"))
    (folder.outcome_folder / "b~lr-0.001~seed-0.json").write_text('{"arm": "b"')
    assert list(folder.outcomes()) == ["a~lr-0.001~seed-0"]
    again = Outcome("b", 1e-3, 0, "tune", "finished")
    assert folder.put(again) and not folder.put(again) and len(folder.outcomes()) == 2
