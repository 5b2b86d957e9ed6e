"""`salient-ds check`, a real training process and the exported adapter name the same matrices and say the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from salient_ds.check.preflight import preflight
from salient_ds.config.run import load_config
from salient_ds.run.export import export_run
from salient_ds.run.shrink import ShrinkOptions, shrink
from tests.launcher.runs import alone, write_run
from tests.support.tiny_architectures import tiny_config


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def checkpoint(kind: str, folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """A tiny model with room for the tokenizer's ids and for 512 positions."""
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind)
    text = config.get_text_config()
    text.vocab_size, text.max_position_embeddings = 192, 512
    for name, value in changes.items():
        setattr(text, name, value)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


def lora_run(folder: Path, model: Path, data: Path) -> Path:
    """Two steps with LoRA on all linear layers."""
    path = write_run(folder, model, data, adapter={"target_modules": "all-linear", "rank": 2}, train={"max_steps": 2})
    run = yaml.safe_load(path.read_text()) | {"method": {"name": "lora"}}
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.mark.parametrize(
    ("kind", "count", "said"), [("qwen2_moe", 16, "the experts are fused"), ("gemma3", 14, "left out")]
)
def test_check_training_and_export(
    kind: str, count: int, said: str, tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path
) -> None:
    run = lora_run(tmp_path, checkpoint(kind, tmp_path / "model", tiny_llama), tiny_alpaca)
    report = preflight(load_config(str(run), []))
    assert report.problems == [] and report.facts["modules"] == count
    (note,) = [note for note in report.notes if said in note]
    status, output = alone(run)
    assert status == 0, output
    assert f"adapters: lora on {count} matrices, rank 2\n" in output and f"note: {note}\n" in output
    trained = json.loads((tmp_path / "run" / "run.json").read_text())["modules"]
    written = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert len(trained) == count and written["target_modules"] == trained
    merged = export_run(tmp_path / "run", "merged", tmp_path / "merged")
    assert (merged / "model.safetensors").is_file()
    shrink_both(tmp_path / "run", tmp_path)


def shrink_both(run: Path, folder: Path) -> None:
    """``salient-ds shrink`` of a run and of its exported adapter are the same adapter."""
    for source, out in ((run, "from_run"), (run / "adapter", "from_adapter")):
        assert shrink(str(source), str(folder / out), ShrinkOptions(rank=1)) == 0
    one, other = (load_file(folder / out / "adapter_model.safetensors") for out in ("from_run", "from_adapter"))
    assert one.keys() == other.keys() and len(one) > 2
    for key in (key for key in one if "lora_A" in key):
        update, expected = (t[key.replace("lora_A", "lora_B")] @ t[key] for t in (one, other))
        assert (update - expected).abs().max() < 1e-5 * expected.abs().max()
    records = [json.loads((folder / out / "salient_ds.json").read_text()) for out in ("from_run", "from_adapter")]
    assert records[0]["ranks"] == records[1]["ranks"] and sum(records[0]["ranks"].values()) == len(records[0]["ranks"])
    for key in ("method", "template", "task_type", "base_model_name_or_path", "source_run"):
        assert records[0][key] == records[1][key] is not None, key
    assert list(records[0]["shrink"]["sha256"]) == ["manifest.json"]
    assert shrink(str(run), str(run / "checkpoints" / "step-00000002" / "x"), ShrinkOptions(rank=1)) == 1


def test_a_table_that_is_too_short_is_noticed_without_a_check_before(
    tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path
) -> None:
    """A training process builds no model for its quick check; the loaded one is looked at."""
    model = checkpoint("opt", tmp_path / "model", tiny_llama, max_position_embeddings=64)
    status, output = alone(lora_run(tmp_path, model, tiny_alpaca))
    assert status != 0 and "Traceback" not in output
    assert (
        "error: data.max_length=160 is above what the model has positions for: they are looked up in a table" in output
    )
