"""Every recipe is a valid run that passes the check, ends at its budget, and adapts the matrices that it says."""

from __future__ import annotations

import json
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from salient_ds.adapters.targets import select_modules
from salient_ds.check import data_rows as data_rows_module
from salient_ds.check.preflight import preflight
from salient_ds.config.run import RunConfig, load_config
from salient_ds.ranks import RankLayout
from salient_ds.recipes.book import Recipe, recipe, recipes, zero_json
from salient_ds.steps import steps_per_epoch, total_steps

ROOT = Path(__file__).resolve().parents[3]
NAMES = list(recipes())
CONFIGS: dict[str, dict[str, Any]] = {
    "DeBERTaV3-base": {
        "model_type": "deberta-v2", "architectures": ["DebertaV2Model"],
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "vocab_size": 128100, "max_position_embeddings": 512, "type_vocab_size": 0,
        "relative_attention": True, "position_buckets": 256, "pos_att_type": ["p2c", "c2p"], "share_att_key": True,
        "norm_rel_ebd": "layer_norm", "position_biased_input": False,
    },
    "BART-large": {
        "model_type": "bart", "architectures": ["BartModel"],
        "d_model": 1024, "encoder_layers": 12, "decoder_layers": 12, "vocab_size": 50265,
        "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096, "encoder_attention_heads": 16, "decoder_attention_heads": 16,
        "max_position_embeddings": 1024,
    },
    "T5-base": {
        "model_type": "t5", "architectures": ["T5ForConditionalGeneration"],
        "d_model": 768, "d_ff": 3072, "d_kv": 64, "num_layers": 12, "num_decoder_layers": 12,
        "num_heads": 12, "vocab_size": 32128,
    },
    "OPT-350M": {
        "model_type": "opt", "architectures": ["OPTForCausalLM"],
        "hidden_size": 1024, "word_embed_proj_dim": 512, "ffn_dim": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "vocab_size": 50272, "do_layer_norm_before": False, "max_position_embeddings": 2048,
    },
    "RoBERTa-base": {
        "model_type": "roberta", "architectures": ["RobertaForMaskedLM"],
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
        "intermediate_size": 3072, "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
    },
    "Gemma-2B": {
        "model_type": "gemma", "architectures": ["GemmaForCausalLM"],
        "hidden_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 8,
        "num_key_value_heads": 1, "head_dim": 256, "intermediate_size": 16384, "vocab_size": 256000,
    },
}  # fmt: skip
"""The shapes of the models, as their config.json gives them."""
MATRICES = {"DeBERTaV3-base": 72, "BART-large": 192, "T5-base": 192, "OPT-350M": 48, "RoBERTa-base": 24, "Gemma-2B": 36}


@cache
def linear_shapes(model: str, head: str) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer, by path."""
    import transformers

    classes = {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "regression": transformers.AutoModelForSequenceClassification,
        "question-answering": transformers.AutoModelForQuestionAnswering,
        "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    }
    config = transformers.AutoConfig.for_model(**CONFIGS[model])
    with torch.device("meta"):
        built = classes[head].from_config(config)
    found = {path: layer for path, layer in built.named_modules() if isinstance(layer, nn.Linear)}
    return {path: (layer.out_features, layer.in_features) for path, layer in found.items()}


def layout(found: Recipe, run: RunConfig) -> RankLayout:
    shapes = linear_shapes(found.model, run.model.task)
    paths = select_modules(list(shapes), run.adapter.target_modules)
    return RankLayout(
        modules=tuple(paths), ranks=(run.adapter.rank,) * len(paths),
        in_features=tuple(shapes[path][1] for path in paths), out_features=tuple(shapes[path][0] for path in paths),
    )  # fmt: skip


def on_this_machine(found: Recipe, folder: Path) -> RunConfig:
    """The recipe with a model folder without weights, and files in place of data sets of the Hub."""
    model, rows = folder / "model", folder / "rows.jsonl"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(CONFIGS[found.model]))
    (model / "tokenizer.json").write_text("{}")
    rows.write_text("{}\n")
    (folder / "zero2.json").write_text(zero_json())
    (folder / "run.yaml").write_text(found.text())
    changes = {"model.path": model, "model.random_weights": "true", "data.train": rows, "data.eval": rows,
               "output_dir": folder / "run"}  # fmt: skip
    return load_config(folder / "run.yaml", [f"{key}={value}" for key, value in changes.items()])


def test_every_row_is_there() -> None:
    tasks = ("mnli", "sst2", "cola", "qqp", "qnli", "rte", "mrpc", "stsb")
    methods = ("salientlora", "salientlora-r8", "adalora", "adalora-r8", "lora2", "increlora", "increlora-r8")
    wanted = {f"glue/{task}/{method}" for task in tasks for method in methods}
    squad = ("adalora-r1", "adalora", "adalora-r4", "adalora-r8", "increlora")
    wanted |= {f"squad/{version}/{method}" for version in ("v1", "v2") for method in squad}
    texts = ("adalora-r1", "adalora", "adalora-r8", "adalora-r16", "salientlora", "t5-base-salientlora")
    wanted |= {f"summarisation/{task}/{method}" for task in ("xsum", "cnn_dailymail") for method in texts}
    searched = ("opt-350m-heterolora", "opt-350m-heterolora-r8", "roberta-base-heterolora", "gemma-2b-heterolora")
    wanted |= {f"glue/{task}/{method}" for task in ("rte", "mrpc", "sst2") for method in searched}
    assert set(NAMES) == wanted and len(NAMES) == 90


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_ends_at_its_budget(name: str) -> None:
    found = recipe(name)
    run = found.run()
    assert run.data.task is not None and run.data.task.name == found.task
    adapted = layout(found, run)
    assert len(adapted.ranks) == MATRICES[found.model]
    total = total_steps(found.rows, run.train.global_batch_size, run.train.epochs or 0)
    events = run.method.events(adapted, total, steps_per_epoch(found.rows, run.train.global_batch_size))
    assert events[-1].step <= total
    if found.method != "heterolora":
        mean = run.method.target_rank
        assert events[-1].total_rank == run.method.final_total(adapted, total) == mean * MATRICES[found.model]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_passes_the_check(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = recipe(name)
    monkeypatch.setattr(data_rows_module, "task_rows", lambda *args: found.rows)
    run = on_this_machine(found, tmp_path)
    report = preflight(run, 1, quick=True)
    assert report.problems == []
    total = total_steps(found.rows, run.train.global_batch_size, run.train.epochs or 0)
    assert (report.facts["total_steps"], report.facts["rows"]) == (total, found.rows)
    assert report.facts["zero"]["stage"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("model", MATRICES)
def test_the_whole_check_of_one_recipe_of_each_model(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is built without weights, so that its layers, heads and attention are compared with the recipe."""
    found = next(found for found in recipes().values() if found.model == model)
    monkeypatch.setattr(data_rows_module, "task_rows", lambda *args: found.rows)
    report = preflight(on_this_machine(found, tmp_path), 1)
    assert report.problems == []
    assert report.facts["modules"] - report.facts.get("shortcuts", 0) == MATRICES[model]
    if found.method != "heterolora":
        assert report.facts["target_total"] == found.run().method.target_rank * MATRICES[model]


@pytest.mark.parametrize("name", NAMES)
def test_the_text_is_the_run(name: str, tmp_path: Path) -> None:
    found = recipe(name)
    text = found.text()
    assert yaml.safe_load(text) == found.sections
    header = [line for line in text.splitlines() if line.startswith("#")]
    for word in ("command", "published", "source", "run here"):
        assert sum(line.startswith(f"# {word} ") for line in header) == 1
    (tmp_path / "run.yaml").write_text(text)
    assert load_config(tmp_path / "run.yaml") == found.run()


def test_numbers_of_the_papers() -> None:
    """One row of each table, number by number."""
    run = recipe("glue/cola/adalora").run()
    assert (run.train.lr, run.train.epochs, run.train.global_batch_size) == (5e-4, 25, 32)
    assert (run.adapter.rank, run.adapter.alpha, run.adapter.orthogonality.coefficient) == (4, 32, 0.5)
    method = run.method
    assert (method.initial_warmup, method.interval, method.final_warmup) == (800, 10, 3500)
    assert (method.target_rank, method.beta1, method.beta2) == (2, 0.85, 0.85)
    run = recipe("glue/rte/salientlora-r8").run()
    assert (run.train.lr, run.train.epochs, run.train.global_batch_size) == (8e-4, 25, 8)
    assert (run.adapter.rank, run.method.target_rank, run.method.initial_warmup) == (60, 8, 600)
    assert total_steps(2490, 8, 25) - run.method.initial_warmup - run.method.final_warmup == 1500
    run = recipe("glue/mnli/increlora").run()
    assert (run.train.lr, run.train.epochs, run.adapter.dropout) == (3.5e-4, 9, 0.2)
    assert (run.method.top_h, run.method.interval, run.train.seed) == (2, 1000, 41)
    run = recipe("glue/qqp/lora2").run()
    assert (run.train.lr, run.train.epochs, run.adapter.rank, run.method.target_rank) == (8e-4, 20, 8, 3)
    run = recipe("squad/v2/adalora").run()
    assert (run.train.lr, run.train.epochs, run.train.global_batch_size, run.data.max_length) == (1e-3, 12, 16, 384)
    run = recipe("summarisation/cnn_dailymail/salientlora").run()
    assert (run.train.lr, run.train.epochs, run.data.max_length) == (8e-4, 15, 1024)
    assert run.data.task is not None and run.data.task.generation == {"max_new_tokens": 160, "num_beams": 4}
    run = recipe("glue/sst2/opt-350m-heterolora").run()
    assert (run.train.lr, run.train.epochs, run.method.keep, run.method.interval) == (1e-4, 10, 0.25, 0.2)
    assert run.adapter.shortcuts is not None and run.adapter.shortcuts.alpha == 4


def test_published_numbers_are_those_of_the_tables() -> None:
    assert recipe("glue/rte/adalora-r8").published == "accuracy 88.09"
    assert recipe("squad/v1/adalora").published.startswith("exact match 87.5, F1 93.6")
    assert recipe("summarisation/xsum/adalora-r16").published.startswith("R-1/2/L 44.72/21.46/36.46")
    assert recipe("glue/rte/salientlora").published.startswith("not readable (the tables are pictures); text:")
    assert all(found.published and found.source for found in recipes().values())


def test_what_recipes_need_is_installed_with_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-data"]["salient_ds.recipes"] == ["*.yaml", "*.json"]
    assert json.loads(zero_json()) == json.loads((ROOT / "ds_configs" / "zero2.json").read_text())
