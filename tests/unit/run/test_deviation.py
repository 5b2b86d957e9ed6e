"""The deviation of a merged model from its adapter model: what is measured, recorded, and when it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.export.api import export_adapter
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.meta import ExportMeta
from salient_ds.run import deviation
from salient_ds.run.deviation import PROMPTS, measure, report_deviation


@pytest.fixture(scope="module")
def factors() -> list[AdapterFactors]:
    """Updates of two layers of the tiny LLaMA, far larger than rounding."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for name, wide, tall in (("model.layers.0.self_attn.q_proj", 32, 32), ("model.layers.1.mlp.down_proj", 64, 32)):
        A, B = torch.randn(2, wide, generator=draw), torch.randn(tall, 2, generator=draw)
        found.append(AdapterFactors(name, A, None, B, torch.ones(2, dtype=torch.bool), 0.1))
    return found


@pytest.fixture
def config(tiny_llama: Path, factors: list[AdapterFactors], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Of a run whose checkpoint holds the factors."""
    found = {"model": {"path": str(tiny_llama), "task": "causal-lm"}, "adapter": {}}
    monkeypatch.setattr("salient_ds.run.applying.read_factors", lambda checkpoint: factors)
    monkeypatch.setattr("salient_ds.run.applying.read_in_full", lambda checkpoint: {})
    monkeypatch.setattr(deviation, "checkpoint_facts", lambda run, checkpoint: (found, None, None))
    return found


def merged(folder: Path, base: Path, factors: list[AdapterFactors], dtype: torch.dtype) -> Path:
    meta = ExportMeta(method="lora", task_type="CAUSAL_LM", source_run="run")
    return export_adapter(factors, meta, folder, "merged", base, dtype)


def test_rounding_shows_and_a_sound_merge_does_not(
    tmp_path: Path, tiny_llama: Path, factors: list[AdapterFactors], config: dict[str, Any]
) -> None:
    exact = measure(config, tmp_path, merged(tmp_path / "fp32", tiny_llama, factors, torch.float32), None)
    rounded = measure(config, tmp_path, merged(tmp_path / "bf16", tiny_llama, factors, torch.bfloat16), None)
    assert exact.largest_logit_difference < 1e-4 * exact.logit_range
    assert exact.same_token == exact.positions > 4 * len(PROMPTS) and exact.dtype == "float32"
    assert 10 * exact.largest_logit_difference < rounded.largest_logit_difference < 0.1 * rounded.logit_range
    assert rounded.dtype == "bfloat16" and "(bfloat16) differs from the adapter model by at most" in rounded.line()


def test_a_merge_without_the_update_is_found(
    tmp_path: Path, tiny_llama: Path, factors: list[AdapterFactors], config: dict[str, Any]
) -> None:
    wrong = merged(tmp_path / "wrong", tiny_llama, factors[:1], torch.float32)
    found = measure(config, tmp_path, wrong, None)
    assert found.largest_logit_difference > 0.01 * found.logit_range


def test_it_is_printed_and_recorded(
    tmp_path: Path,
    tiny_llama: Path,
    factors: list[AdapterFactors],
    config: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = merged(tmp_path / "merged", tiny_llama, factors, torch.bfloat16)
    before = json.loads((folder / "salient_ds.json").read_text())
    report_deviation(tmp_path, tmp_path, folder, None)
    record = json.loads((folder / "salient_ds.json").read_text())
    found = record.pop("deviation")
    assert record == before and found["dtype"] == "bfloat16" and found["largest_logit_difference"] > 0
    assert "positions" in capsys.readouterr().err


@pytest.mark.parametrize("why", ["task", "memory"])
def test_where_it_is_not_measured_a_line_says_so(
    tmp_path: Path,
    tiny_llama: Path,
    factors: list[AdapterFactors],
    config: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    why: str,
) -> None:
    folder = merged(tmp_path / "merged", tiny_llama, factors, torch.float32)
    before = (folder / "salient_ds.json").read_bytes()
    capsys.readouterr()
    if why == "task":
        config["model"]["task"] = "regression"
    else:
        monkeypatch.setattr(deviation, "_free_memory", lambda: 1000)
    report_deviation(tmp_path, tmp_path, folder, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("the deviation of the merged model was not measured: ")
    assert ("model.task=regression" if why == "task" else "0.0 GiB are free") in line
    assert (folder / "salient_ds.json").read_bytes() == before
