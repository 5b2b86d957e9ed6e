"""The command ``salient-ds sweep`` as a user starts, kills, continues and changes it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launcher.runs import environment, write_run

pytestmark = pytest.mark.slow

ARMS: dict[str, Any] = {
    "lora": {"method": {"name": "lora"}, "adapter.rank": 3, "adapter.dropout": 0.0},
    "salient": {"train.lr_schedule": "constant"},
}


def write_sweep(folder: Path, **changes: Any) -> Path:
    given: dict[str, Any] = {
        "run": "base/run.yaml", "output_dir": str(folder / "out"), "arms": ARMS, "lr": [3e-3, 1e-2],
        "seeds": {"tune": [0], "fresh": [1, 2]}, "jobs": 2,
    }  # fmt: skip
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(given | changes))
    return path


def command(path: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "salient_ds.cli", "sweep", str(path), *options]


def run(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(path, *options), cwd=path.parent, env=environment(), text=True, capture_output=True, timeout=400,
        check=False,
    )  # fmt: skip


def outcomes(folder: Path) -> dict[str, Any]:
    files = sorted((folder / "out" / "queue" / "outcomes").glob("*.json"))
    return {file.stem: json.loads(file.read_text()) for file in files}


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in found.split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_alpaca: Path) -> Path:
    place = tmp_path_factory.mktemp("sweep")
    write_run(place / "base", tiny_llama, tiny_alpaca, train={"max_steps": 60, "save_every": 3, "log_every": 1})
    return place


def test_a_dry_run_writes_nothing(folder: Path) -> None:
    done = run(write_sweep(folder), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "8 runs: 4 to tune + 4 on fresh seeds; 0 are done" in done.stdout
    assert done.stdout.count("salient-ds train ") == 8 and "lr-CHOSEN/seed-2.yaml" in done.stdout
    assert not (folder / "out").exists()


def test_kill_everything_and_continue(folder: Path) -> None:
    path = write_sweep(folder)
    leader = subprocess.Popen(command(path), cwd=folder, env=environment(), stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list((folder / "out" / "runs").rglob("step-*/manifest.json")):
        assert time.monotonic() < until and leader.poll() is None
        time.sleep(0.05)
    second = run(path)
    assert second.returncode == 1 and "is led by process" in second.stderr
    workers = children(leader.pid)
    assert len(workers) == 2
    for pid in (leader.pid, *workers):
        os.kill(pid, signal.SIGKILL)
    leader.wait()
    kept = outcomes(folder)
    assert len(kept) < 8
    done = run(path)
    assert done.returncode == 0, done.stderr
    found = outcomes(folder)
    assert len(found) == 8 and {o["status"] for o in found.values()} == {"finished"}
    assert all(found[name] == outcome for name, outcome in kept.items())
    assert any(o["start_step"] > 0 for o in found.values())  # a half run went on from its checkpoint
    result = json.loads((folder / "out" / "sweep.json").read_text())
    assert result["complete"] and [item["n"] for item in result["comparisons"]] == [2]
    assert "8/8 runs" in done.stderr and "report:" in done.stdout


def test_a_finished_sweep_starts_no_worker(folder: Path) -> None:
    before = (folder / "out" / "queue" / "workers.log").stat().st_size
    claims = len(list((folder / "out" / "queue" / "claims").iterdir()))
    done = run(write_sweep(folder))
    assert done.returncode == 0 and "8 are done" in done.stdout
    assert (folder / "out" / "queue" / "workers.log").stat().st_size == before
    assert len(list((folder / "out" / "queue" / "claims").iterdir())) == claims


def test_one_failing_run_does_not_stop_the_others(folder: Path) -> None:
    out = folder / "out"
    for name in ("lora~lr-0.003~seed-0", "salient~lr-0.003~seed-0"):
        (out / "queue" / "outcomes" / f"{name}.json").unlink()
    broken = out / "runs" / "lora" / "lr-0.003" / "seed-0"
    shutil.rmtree(broken)
    broken.write_text("a file")
    done = run(write_sweep(folder))
    assert done.returncode == 1
    assert "error: runs/lora/lr-0.003/seed-0 failed: RunDirectoryError" in done.stderr and "is a file" in done.stderr
    assert f"log: {broken}.log" in done.stderr
    assert outcomes(folder)["salient~lr-0.003~seed-0"]["status"] == "finished"
    broken.unlink()
    again = run(write_sweep(folder))  # a failed run is tried again
    assert again.returncode == 0, again.stderr


def test_changed_arms_are_refused_and_replaced_on_demand(folder: Path) -> None:
    path = write_sweep(folder, arms=ARMS | {"lora": ARMS["lora"] | {"adapter.rank": 2}}, seeds={"fresh": [1]})
    before = outcomes(folder)
    done = run(path)
    assert done.returncode == 1 and outcomes(folder) == before
    assert "arm 'lora' was run with other settings (adapter.rank: 3 before, 2 now)" in done.stderr
    done = run(path, "--overwrite")
    assert done.returncode == 0, done.stderr
    after = outcomes(folder)
    salient = {name: outcome for name, outcome in before.items() if name.startswith("salient")}
    assert {name: o for name, o in after.items() if name.startswith("salient")} == salient
    assert {o["total_rank"] for name, o in after.items() if name.startswith("lora")} == {28}  # 14 matrices of rank 2


def test_ctrl_c_saves_and_a_worker_elsewhere_finishes(tmp_path: Path, folder: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    path = write_sweep(tmp_path, arms={"lora": ARMS["lora"]}, lr=[1e-2], seeds={"fresh": []}, jobs=0)
    leader = subprocess.Popen(command(path, "--jobs", "1"), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while not list((tmp_path / "out" / "runs").rglob("step-*/manifest.json")):
        assert time.monotonic() < until and leader.poll() is None
        time.sleep(0.02)
    leader.send_signal(signal.SIGINT)
    _, said = leader.communicate(timeout=200)
    assert leader.returncode == 130 and b"workers save a checkpoint" in said
    if not outcomes(tmp_path):  # it may have been at its last step
        log = next((tmp_path / "out" / "runs").rglob("*.log")).read_text()
        assert "sweep: stopped after step" in log
    worker = run(path, "--worker")
    assert worker.returncode == 0, worker.stderr
    assert [o["status"] for o in outcomes(tmp_path).values()] == ["finished"]
    assert run(path, "--worker", "--dry-run").returncode == 2


def test_every_arm_is_checked_first(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    arms = {"a": {"adapter.rank": 0}, "b": {"method.target_rankk": 2}, "c": {"data.eval_size": 0}}
    done = run(write_sweep(tmp_path, arms=arms))
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    for text in ("arm 'a': adapter.rank=0", "arm 'b': unknown key 'method.target_rankk'", "arm 'c': no held-out data"):
        assert text in done.stderr
    assert "3 problems, nothing was started" in done.stderr
