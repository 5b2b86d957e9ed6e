"""``fresh_eval``: fresh seeds are judged by rows that chose no learning rate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from salient_ds.strict import ConfigError
from salient_ds.sweep.arms import arm_runs, fingerprint, fresh_data, job_run
from salient_ds.sweep.folder import SweepFolder
from salient_ds.sweep.plan import Job
from salient_ds.sweep.spec import SweepSpec, load_spec
from salient_ds.sweep.worker import Worker

RUN: dict[str, Any] = {
    "deepspeed": "ds.json", "model": {"path": "m"}, "adapter": {"rank": 2}, "method": {"name": "lora"},
    "data": {"train": "train.jsonl", "eval": "validation.jsonl"}, "train": {"max_steps": 1},
}  # fmt: skip


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(RUN))
    (tmp_path / "test.jsonl").write_text("{}\n")
    spec = {"run": "run.yaml", "output_dir": str(tmp_path / "out"), "arms": {"a": {}}, "lr": [1e-3],
            "fresh_eval": "test.jsonl"}  # fmt: skip
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def test_only_runs_on_fresh_seeds_use_it(sweep_file: Path) -> None:
    spec = load_spec(sweep_file)
    folder = SweepFolder(Path(spec.output_dir))
    runs = arm_runs(spec, sweep_file)
    held_out = fresh_data(spec, sweep_file)
    folder.begin({name: fingerprint(run, held_out) for name, run in runs.items()}, [], [])
    worker = Worker(spec, sweep_file, folder)
    found = {
        phase: yaml.safe_load(worker._write_run(Job("a", 1e-3, seed, phase)).read_text())["data"]["eval"]
        for phase, seed in (("tune", 0), ("widen", 0), ("fresh", 1))
    }
    assert found["tune"] == found["widen"] != str(sweep_file.parent / "test.jsonl")
    assert found["fresh"] == str(sweep_file.parent / "test.jsonl")


def test_other_test_rows_are_another_arm(sweep_file: Path) -> None:
    spec = load_spec(sweep_file)
    (run,) = arm_runs(spec, sweep_file).values()
    held_out = fresh_data(spec, sweep_file)
    assert held_out is not None
    before = fingerprint(run, held_out)
    assert before != fingerprint(run)
    held_out.write_text('{"other": 1}\n')
    assert fingerprint(run, held_out) != before


def test_a_file_that_is_not_there_is_refused(sweep_file: Path) -> None:
    (sweep_file.parent / "test.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"fresh_eval='test\.jsonl' does not exist"):
        fresh_data(load_spec(sweep_file), sweep_file)


def test_without_it_the_run_file_decides(tmp_path: Path) -> None:
    spec = SweepSpec.model_validate({"run": "r", "output_dir": "o", "arms": {"a": {}}, "lr": [1e-3]})
    assert fresh_data(spec, tmp_path / "sweep.yaml") is None
    assert job_run(RUN, 1e-3, 1, tmp_path)["data"] == RUN["data"]
