"""scale.py on two CPU processes: the whole command, and counted bytes that equal the formulas."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from salient_eval.bench.scale_page import page

ROOT = Path(__file__).resolve().parents[3]


def run(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "eval/bench/scale.py", "--device", "cpu", "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170)


def test_two_processes_send_what_the_formulas_say(tmp_path: Path) -> None:
    done = run(
        tmp_path, "--shapes", "tiny", "--gpus", "2", "--arms", "salientlora@8", "--zero", "2", "--scaling", "weak",
        "--steps", "3", "--warmup", "1", "--commit", "none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    (arm,) = json.loads((folder / "result.json").read_text())["arms"]
    scale = arm["scale"]
    assert {key: scale["step"][key] for key in ("summed", "gathered")} == {
        key: scale["step_by_formula"][key] for key in ("summed", "gathered")
    }
    assert scale["events"] and all(0 < event["bytes"] <= event["bytes_by_formula"] for event in scale["events"])
    assert isinstance(scale["stall"], float) and arm["gpus"] == 2
    assert "| tiny | weak | salientlora | 2 | 8 | 2 | 4 |" in (folder / "README.md").read_text()


@pytest.mark.parametrize("options", [("--scaling", "sideways"), ("--shapes", "huge"), ("--zero", "7")])
def test_what_is_unknown_is_said_before_anything_starts(options: tuple[str, str], tmp_path: Path) -> None:
    done = run(tmp_path, *options)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and not list(tmp_path.iterdir())


def test_tokens_are_compared_with_the_same_arm_on_one_gpu() -> None:
    arm = {
        "shape": "tiny", "scaling": "weak", "arm": "lora", "compiled": False, "zero": 2, "rank": 8, "gpus": 1,
        "batch": 4, "seconds": 1.0, "spread": 0.1, "tokens_per_s": 100.0, "peak_gib": 1.0,
        "scale": {"step": {"summed": 10, "gathered": 0}},
    }  # fmt: skip
    found = {
        "hardware": {"cpu": "some", "gpu": None}, "command": "c", "commit": "x", "date": "d", "versions": {},
        "arms": [arm, arm | {"gpus": 4, "tokens_per_s": 380.0}], "missing": ["8 GPUs: this machine has 4"],
    }  # fmt: skip
    text = page(found)
    assert "| 3.80 |" in text and "- 8 GPUs: this machine has 4" in text
