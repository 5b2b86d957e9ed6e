"""Layers and sizes that are known before training equal those of the model that training builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salient_ds.check import built_model as module
from salient_ds.check.built_model import BuiltModel, built_model, cache_folder, describe, plain_model
from salient_ds.check.model_files import ModelFiles, inspect_model
from salient_ds.check.model_shapes import _FAMILIES
from salient_ds.check.preflight import preflight
from salient_ds.config.run import ModelConfig, RunConfig, parse_config
from tests.support.tiny_architectures import tiny_config

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "salient_ds" / "models"


def saved(kind: str, folder: Path, **changes: Any) -> ModelConfig:
    """config.json of a tiny model, without weights."""
    tiny_config(kind).save_pretrained(folder)
    if changes:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
    return ModelConfig(path=str(folder), random_weights=True)


def run_of(model: ModelConfig, tmp_path: Path, data: Path, tokenizer: Path, **settings: Any) -> RunConfig:
    return parse_config(
        {
            "output_dir": str(tmp_path / "run"),
            "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
            "model": {"path": model.path, "random_weights": True, "tokenizer": str(tokenizer)},
            "adapter": {"rank": 4, "target_modules": settings.pop("targets", "all-linear")},
            "method": {"name": "lora"},
            "data": {"train": str(data), "max_length": 32},
            "train": {"max_steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "precision": "fp32"},
        }
    )


@pytest.mark.parametrize("family", _FAMILIES)
def test_plain_families_need_no_process(family: str, tmp_path: Path) -> None:
    model = saved(family, tmp_path)
    known = built_model(model, inspect_model(model), quick=True)
    assert isinstance(known, BuiltModel) and known == plain_model(inspect_model(model).config)
    answer = describe(str(tmp_path), "AutoModelForCausalLM")
    assert known.adaptable == known.adaptable.from_json(answer["adaptable"])
    assert list(known.adaptable.linears) == list(answer["adaptable"]["linears"])  # in the same order
    assert known.limits.to_json() == answer["limits"]


def test_others_are_asked_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = saved("mixtral", tmp_path / "model")
    files = inspect_model(model)
    assert built_model(model, files, quick=True) == "it has to be built for that"
    known = built_model(model, files)
    assert isinstance(known, BuiltModel) and len(known.adaptable.linears) == 8 and known.adaptable.experts is not None
    assert known.parameters is not None and known.limits.rows == 96
    assert len(list(cache.iterdir())) == 1 and cache_folder() == cache

    def refuse(*_: Any) -> Any:
        raise AssertionError("asked again")

    monkeypatch.setattr(module, "ask", refuse)
    assert built_model(model, files) == built_model(model, files, quick=True) == known
    monkeypatch.setattr(module, "ask", lambda *_: {"unknown": "asked again"})
    other = saved("mixtral", tmp_path / "model", num_hidden_layers=3)
    assert built_model(other, inspect_model(other)) == "asked again"
    assert len(list(cache.iterdir())) == 1, "what is not known is asked again next time"


def test_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    model = saved("mixtral", tmp_path / "model")
    monkeypatch.setattr(module, "ask", lambda name, question: describe(**question))
    assert isinstance(built_model(model, inspect_model(model)), BuiltModel)


def test_models_that_cannot_be_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ask", lambda name, question: describe(**question))
    novel = tmp_path / "novel"
    novel.mkdir()
    (novel / "config.json").write_text('{"model_type": "novel"}')
    model = ModelConfig(path=str(novel), random_weights=True)
    reason = built_model(model, inspect_model(model))
    assert isinstance(reason, str) and "cannot read" in reason and "novel" in reason
    own_code = saved("llama", tmp_path / "own", auto_map={"AutoModelForCausalLM": "modeling.Own"})
    own_code = own_code.model_copy(update={"trust_remote_code": True})
    assert "trust_remote_code" in str(built_model(own_code, inspect_model(own_code)))
    assert built_model(model, ModelFiles("a/b")) == "there is no config.json to build it from"
    broken = saved("mixtral", tmp_path / "broken", hidden_size="many")
    assert isinstance(built_model(broken, inspect_model(broken)), str)
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path / "vit")
    vit = ModelConfig(path=str(tmp_path / "vit"), random_weights=True)
    with pytest.raises(ValueError, match="model_type='vit' has no class for AutoModelForCausalLM: choose"):
        built_model(vit, inspect_model(vit))


@pytest.mark.parametrize(
    ("kind", "count", "said"),
    [("qwen2_moe", 16, "experts are fused"), ("gemma3", 14, "in model.vision_tower"), ("llama", 14, None)],
)
def test_the_report(
    kind: str, count: int, said: str | None, tmp_path: Path, tiny_alpaca: Path, tiny_llama: Path
) -> None:
    model = saved(kind, tmp_path / "model", max_position_embeddings=512)
    run = run_of(model, tmp_path, tiny_alpaca, tiny_llama)
    report = preflight(run)
    assert report.facts["modules"] == count
    assert [note for note in report.notes if "linear layers" in note and (said or "?") in note] or said is None
    quick = preflight(run, quick=True)
    assert quick.facts["modules"] == count, "from the cache, or without it"
    report = preflight(run_of(model, tmp_path, tiny_alpaca, tiny_llama, targets=["w1"]))
    assert "'w1'" in report.problems[-1] and "modules" not in report.facts
