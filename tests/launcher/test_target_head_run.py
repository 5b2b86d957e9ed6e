"""A whole run on packed rows, with logits at targets only: the same losses, and summary.json says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.launcher.runs import alone, write_run

pytestmark = pytest.mark.slow


def test_a_run_with_packed_rows_is_the_same(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    losses, facts = {}, {}
    for head in (False, True):
        run = write_run(
            tmp_path / str(head), tiny_llama, tiny_alpaca, data={"packing": True},
            train={"max_steps": 24}, adapter={"dropout": 0.0},
        )  # fmt: skip
        status, output = alone(run, f"speed.target_head={str(head).lower()}")
        assert status == 0, output
        lines = [json.loads(line) for line in (run.parent / "run" / "metrics.jsonl").read_text().splitlines()]
        losses[head] = [line["loss"] for line in lines if "loss" in line]
        facts[head] = json.loads((run.parent / "run" / "summary.json").read_text())["speed"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-3) and len(losses[True]) == 24
    assert (facts[False]["target_head"], facts[True]["target_head"]) == (False, True)
    assert facts[True]["fused_adapters"] == facts[True]["adapters"] > 0
