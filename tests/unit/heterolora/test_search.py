"""The static search from a run file to files that train, and what a dynamic one leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from salient_ds.check.preflight import preflight
from salient_ds.cli import app
from salient_ds.config.run import RunConfig, load_config, parse_config
from salient_ds.heterolora.results import FILES, chosen_config, on_frequency, peft_pattern
from salient_ds.run.search import SearchOptions, search_config
from salient_ds.strict import ConfigError
from tests.support.spawn import spawn

ROOT = Path(__file__).resolve().parents[3]
Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


def settings(folder: Path, model: Path, data: Path, **sections: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "model": {"path": str(model)},
        "adapter": {"rank": 4, "target_modules": ["q_proj", "v_proj"], "alpha": 16, "shortcuts": {"rank": 2}},
        "method": {"name": "heterolora", "keep": 0.5},
        "data": {"train": str(data)},
        "train": {"epochs": 1, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "precision": "fp32"},
    } | sections


@pytest.fixture
def run(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> RunConfig:
    return parse_config(settings(tmp_path, tiny_llama, tiny_alpaca))


def test_the_searching_configuration(run: RunConfig) -> None:
    options = SearchOptions(proxy="snip", batches=7, budget=0.3, unit="params", mode="off")
    found = search_config(run, options)
    method = found.method
    assert (method.proxy, method.probe_batches, method.keep, method.budget_unit, method.mode) == (  # type: ignore[union-attr]
        "snip", 7, 0.3, "params", "off",
    )  # fmt: skip
    assert found.adapter == run.adapter and found.train == run.train
    with pytest.raises(ConfigError, match="method.keep=1.5"):
        search_config(run, SearchOptions(budget=1.5))
    with pytest.raises(ConfigError, match="method.proxy='gradnorm'"):
        search_config(run, SearchOptions(proxy="gradnorm"))


def test_chosen_configurations(run: RunConfig) -> None:
    both = chosen_config(run, [Q, V, "model.layers.1.shortcut_ffn"])
    assert parse_config(both).method.name == "lora"
    assert both["adapter"]["target_modules"] == [Q, V] and both["output_dir"] == f"{run.output_dir}-chosen"
    assert both["adapter"]["shortcuts"]["modules"] == ["model.layers.1.shortcut_ffn"]
    linears = chosen_config(run, [V], rank=16, method={"name": "adalora", "target_rank": 8})
    assert "shortcuts" not in linears["adapter"]
    parsed = parse_config(linears)
    assert (parsed.adapter.rank, parsed.method.name) == (16, "adalora")
    only = parse_config(chosen_config(run, ["model.layers.0.residual_1"]))
    assert only.adapter.target_modules == [] and preflight(only).problems == []
    data = run.model_dump(mode="json", by_alias=True, exclude_unset=True)
    data["adapter"]["shortcuts"]["norm_after_shortcut"] = "reuse"
    reuse = parse_config(data)
    assert chosen_config(reuse, [V])["adapter"]["shortcuts"]["modules"] == []  # its norms are part of the function
    with pytest.raises(ValueError, match="raise the budget"):
        chosen_config(run, [])


def test_peft_takes_the_pattern(run: RunConfig) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    pattern = peft_pattern(chosen_config(run, [Q, V]))
    model = AutoModelForCausalLM.from_pretrained(run.model.path)
    wrapped = get_peft_model(model, LoraConfig(**pattern))
    adapted = {name.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight"): p.shape[0]
               for name, p in wrapped.named_parameters() if "lora_A" in name}  # fmt: skip
    assert adapted == {Q: 4, V: 4}


def test_frequencies_leave_skipped_events_out() -> None:
    history = [{"on": [True, False]}, {"skipped": "not finite"}, {"on": [True, True]}]
    assert on_frequency(history, ["a", "b"]) == {"a": 1.0, "b": 0.5}


def search(rank: int, world: int, path: Path, folder: Path, options: SearchOptions) -> None:
    from salient_ds.run import search as module

    run = load_config(path)
    module._search(run, search_config(run, options), options, torch.device("cpu"))


def train(rank: int, world: int, path: Path) -> list[str]:
    from salient_ds.run.training import Training

    training = Training(load_config(path), torch.device("cpu"))
    training.run("never", overwrite=True)
    return list(training.engine.adapted.adapters)


def search_then_train(rank: int, world: int, path: Path, folder: Path) -> dict[str, Any]:
    """A static search, the run that it leads to, and a dynamic search whose result trains as well."""
    search(rank, world, path, folder, SearchOptions(batches=3, budget=0.34, output=str(folder / "found")))
    chosen = train(rank, world, folder / "found" / "final.yaml")
    train(rank, world, path)
    again = train(rank, world, folder / "run" / "search" / "final.yaml")
    return {"chosen": chosen, "again": again}


def test_a_search_on_two_processes_leads_to_a_run(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> None:
    path = tmp_path / "run.yaml"
    method = {"name": "heterolora", "keep": 0.34, "interval": 0.25, "probe_batches": 3, "constant_epochs": 0.5}
    path.write_text(yaml.safe_dump(settings(tmp_path, tiny_llama, tiny_alpaca, method=method)))
    reports = spawn(2, search_then_train, path, tmp_path)
    assert reports[0] == reports[1]
    found = tmp_path / "found"
    assert set(FILES) <= {p.name for p in found.iterdir()}
    scores = json.loads((found / "scores.json").read_text())
    assert sorted(scores["on"]) == sorted(reports[0]["chosen"]) and scores["spent"] == scores["budget"] == 1 + 2
    assert len(scores["scores"]) == 11 and all(value > 0 for value in scores["scores"].values())
    assert (found / "modules.png").stat().st_size > 5000
    dynamic = tmp_path / "run" / "search"
    history = json.loads((dynamic / "history.json").read_text())
    assert [e["proxy"] for e in history["events"]] == ["constant"] * 2 + ["grad_norm"] * 2
    on = [n for n, is_on in zip(history["modules"], history["events"][-1]["on"], strict=True) if is_on]
    assert sorted(on) == sorted(reports[0]["again"])
    frequency = json.loads((dynamic / "on_frequency.json").read_text())
    assert set(frequency.values()) <= {0, 0.25, 0.5, 0.75, 1} and (dynamic / "on_frequency.png").exists()
    assert len((tmp_path / "run" / "allocations.jsonl").read_text().splitlines()) == 4


def test_toml_files_become_a_section(tmp_path: Path) -> None:
    lora = tmp_path / "lora.toml"
    lora.write_text('granularity = "network"\n[default]\nr = 0\n[all_layers.q_proj]\nr = 8\nlora_alpha = 16\n'
                    'lora_dropout = 0.0\nadapter_name = "a"\ndisable_adapter = false\n')  # fmt: skip
    done = CliRunner().invoke(app, ["convert-toml", str(lora), "--model", "llama"])
    assert done.exit_code == 0, done.output
    section = yaml.safe_load(done.stdout)["adapter"]
    assert section["rank"] == 8 and section["target_modules"] == ["q_proj"]
    wrong = CliRunner().invoke(app, ["convert-toml", str(lora), "--model", "gpt"])
    assert wrong.exit_code == 1
