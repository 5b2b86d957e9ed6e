"""Every shipped recipe is a valid run, and the paper's recipes are the paper's setting."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from salient_ds.adapters.options import LLAMA_MODULES
from salient_ds.check.preflight import Report, preflight
from salient_ds.config.run import load_config

RECIPES = Path(__file__).resolve().parents[3] / "launch" / "recipes"
PAPER = ("llama-7b-alpaca-salientlora", "llama-2-7b-alpaca-salientlora")
METHODS = tuple(f"llama-7b-alpaca-{name}" for name in ("adalora", "lora2", "increlora", "spectral", "lora"))
SEARCH = ("llama-7b-alpaca-heterolora",)
DEMOS = ("demo_smollm2", "demo_tiny")
SHAPES = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 32, "vocab_size": 32000},
    "smollm2": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                "num_key_value_heads": 3, "vocab_size": 49152},
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 4, "vocab_size": 512},
}  # fmt: skip


def make_model(folder: Path, shape: str, tiny_llama: Path) -> Path:
    """A checkpoint directory with a config.json and a tokenizer, enough for a check."""
    folder.mkdir()
    common = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(common | SHAPES[shape]))
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_llama / name).read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_rows(path: Path, number: int) -> Path:
    path.write_text('{"instruction": "Name a river.", "output": "The Elbe."}\n' * number)
    return path


def check(recipe: str, shape: str, rows: int, processes: int, tmp_path: Path, tiny_llama: Path) -> Report:
    overrides = [
        f"model.path={make_model(tmp_path / 'model', shape, tiny_llama)}",
        "model.random_weights=true",
        f"data.train={make_rows(tmp_path / 'rows.jsonl', rows)}",
        f"output_dir={tmp_path / 'run'}",
    ]
    return preflight(load_config(RECIPES / f"{recipe}.yaml", overrides), processes, quick=True)


def test_every_recipe_is_tested_here() -> None:
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == sorted([*PAPER, *METHODS, *SEARCH, *DEMOS])


@pytest.mark.parametrize("recipe", [*PAPER, *METHODS, *SEARCH, *DEMOS])
def test_the_header_says_what_a_reader_needs(recipe: str) -> None:
    text = (RECIPES / f"{recipe}.yaml").read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    for word in ("command", "hardware", "time", "score"):
        entries = [line for line in header if line.startswith(f"# {word} ")]
        assert len(entries) == 1 and len(entries[0].split()) > 3, f"{recipe} does not say its {word}"
    assert f"launch/recipes/{recipe}.yaml" in text


@pytest.mark.parametrize("recipe", PAPER)
def test_paper_recipes_are_the_papers_setting(recipe: str, tmp_path: Path, tiny_llama: Path) -> None:
    run = load_config(RECIPES / f"{recipe}.yaml")
    assert run.adapter.target_modules == LLAMA_MODULES
    assert (run.method.name, run.adapter.rank, run.train.lr, run.train.epochs) == ("salientlora", 480, 5e-4, 25)
    assert (run.method.beta, run.method.gamma, run.method.lambda_) == (0.9, 2, 0.7)
    assert (run.method.window_initial, run.method.window_final) == (10, 200)

    report = check(recipe, "llama-7b", 51_974, 8, tmp_path, tiny_llama)
    assert report.problems == []
    assert report.facts["modules"] == 224
    assert (report.facts["initial_total"], report.facts["target_total"]) == (107_520, 14_336)
    assert report.facts["total_steps"] == 162_419
    events = report.facts["events"]
    assert events[0]["step"] == 6010
    assert (events[-1]["step"], events[-1]["total_rank"]) == (31_000, 14_336)
    assert report.facts["trainable_end"] == pytest.approx(159.9e6, rel=1e-3)


def test_the_two_paper_recipes_differ_in_the_model_only() -> None:
    first, second = (load_config(RECIPES / f"{name}.yaml").model_dump() for name in PAPER)
    different = {key for key in first if first[key] != second[key]}
    assert different == {"model", "output_dir"}


@pytest.mark.parametrize(("recipe", "shape", "modules"), [("demo_smollm2", "smollm2", 210), ("demo_tiny", "tiny", 14)])
@pytest.mark.parametrize("processes", [1, 2])
def test_demo_recipes(recipe: str, shape: str, modules: int, processes: int, tmp_path: Path, tiny_llama: Path) -> None:
    report = check(recipe, shape, 2000, processes, tmp_path, tiny_llama)
    assert report.problems == []
    assert report.facts["modules"] == modules
    assert report.facts["zero"]["stage"] == 2
    assert len(report.facts["events"]) >= 3
    assert report.facts["events"][-1]["total_rank"] == report.facts["target_total"] < report.facts["initial_total"]


@pytest.mark.parametrize("recipe", METHODS)
def test_recipes_of_the_other_methods_pass_the_check(recipe: str, tmp_path: Path, tiny_llama: Path) -> None:
    run = load_config(RECIPES / f"{recipe}.yaml")
    report = check(recipe, "llama-7b", 51974, 8, tmp_path, tiny_llama)
    assert report.problems == []
    assert report.facts["modules"] == 224 and run.method.name == recipe.rsplit("-", 1)[1]
    if run.method.name != "lora":
        assert report.facts["events"][-1]["total_rank"] == report.facts["target_total"] == run.method.target_rank * 224


@pytest.mark.parametrize("recipe", SEARCH)
def test_the_recipe_of_the_search_passes_the_check(recipe: str, tmp_path: Path, tiny_llama: Path) -> None:
    report = check(recipe, "llama-7b", 51_974, 8, tmp_path, tiny_llama)
    assert report.problems == []
    assert (report.facts["modules"], report.facts["shortcuts"]) == (64 + 127, 127)
    assert report.facts["target_total"] == (21 + 42) * 64
    steps = [event["step"] for event in report.facts["events"]]
    assert (len(steps), steps[0], steps[4]) == (9, 0, 407) and steps[-1] < 0.67 * report.facts["total_steps"]
