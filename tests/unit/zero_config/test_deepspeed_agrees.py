"""The shipped ZeRO JSONs and our list of keys against the installed DeepSpeed (one subprocess, no engine)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from salient_ds.zero.ds_json import load_ds_config, resolve_ds_config, summary
from salient_ds.zero.ds_keys import REMOVED_TOP_LEVEL, REMOVED_ZERO, SECTIONS, TOP_LEVEL
from tests.unit.zero_config.runs import make_run

ROOT = Path(__file__).resolve().parents[3]
SHIPPED = {
    "zero0": (0, False, False),
    "zero1": (1, False, False),
    "zero2": (2, False, False),
    "zero2_offload": (2, True, False),
    "zero3": (3, False, False),
    "zero3_offload": (3, True, True),
    "cpu": (2, False, False),
}
PROCESSES = (1, 2, 8)


def resolved(name: str, processes: int) -> dict[str, Any]:
    raw = load_ds_config(ROOT / "ds_configs" / f"{name}.json")
    run = make_run(precision="fp32" if name == "cpu" else "bf16", max_grad_norm=0.25)
    return resolve_ds_config(raw, run, processes, 100, hidden_size=64)


@pytest.fixture(scope="module")
def deepspeed_says() -> dict[str, Any]:
    configs = [(name, processes, resolved(name, processes)) for name in SHIPPED for processes in PROCESSES]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("deepspeed_probe.py"))],
        input=json.dumps(configs),
        capture_output=True,
        text=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def test_all_shipped_files_are_listed_here() -> None:
    assert {path.stem for path in (ROOT / "ds_configs").glob("*.json")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("processes", PROCESSES)
def test_shipped_files_resolve(name: str, processes: int) -> None:
    ds = resolved(name, processes)
    assert '"auto"' not in json.dumps(ds)
    assert ds["gradient_accumulation_steps"] == 16 // (2 * processes)
    found = summary(ds)
    assert (found.stage, found.offload_optimizer, found.offload_param) == SHIPPED[name]


def test_deepspeed_understands_them_as_meant(deepspeed_says: dict[str, Any]) -> None:
    for name, (stage, _, _) in SHIPPED.items():
        for processes in PROCESSES:
            assert deepspeed_says["accepts"][f"{name}@{processes}"] == {
                "stage": stage,
                "batch": [16, 2, 16 // (2 * processes)],
                "clipping": 0.25,
                "bf16": name != "cpu",
            }


def test_our_keys_are_deepspeeds(deepspeed_says: dict[str, Any]) -> None:
    """Fails when another DeepSpeed reads other keys: go through salient_ds/zero/ds_keys.py then."""
    theirs = deepspeed_says["keys"]
    # it reads these in places that building a configuration does not reach
    elsewhere = {"data_parallel_size", "allgather_size"}
    assert set(theirs[""]) - elsewhere == set(TOP_LEVEL) - elsewhere
    assert set(theirs["removed"]) == set(REMOVED_TOP_LEVEL)
    assert set(theirs["removed zero"]) == set(REMOVED_ZERO)
    for section in set(theirs) - {"", "removed", "removed zero"}:
        assert set(theirs[section]) == set(SECTIONS[section]), section
