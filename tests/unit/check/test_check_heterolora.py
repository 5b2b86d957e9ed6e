"""What a check says about a search for modules: events, budget, shortcuts, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salient_ds.adapters.targets import select_shortcuts, shortcut_candidates
from salient_ds.check.preflight import Report, preflight
from salient_ds.config.run import parse_config
from salient_ds.strict import ConfigError

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def settings(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> dict[str, Any]:
    """64 rows, 2 epochs of 16 steps; 4 linear layers and 7 shortcuts."""
    return {
        "output_dir": str(tmp_path / "run"),
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "model": {"path": str(tiny_llama)},
        "adapter": {"rank": 8, "target_modules": ["q_proj", "v_proj"], "shortcuts": {"rank": 4}},
        "method": {"name": "heterolora", "interval": 0.25, "mode": "separated"},
        "data": {"train": str(tiny_alpaca)},
        "train": {"epochs": 2, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "precision": "fp32"},
    }


def check(settings: dict[str, Any], **sections: dict[str, Any]) -> Report:
    merged = json.loads(json.dumps(settings))
    for name, changes in sections.items():
        merged[name].update(changes)
    return preflight(parse_config(merged))


def test_facts_of_a_search(settings: dict[str, Any]) -> None:
    report = check(settings)
    assert report.problems == []
    facts = report.facts
    assert (facts["modules"], facts["shortcuts"], facts["initial_total"]) == (11, 7, 4 * 8 + 7 * 4)
    # one of 4 linear layers, two of 7 shortcuts
    assert facts["target_total"] == 8 + 2 * 4
    assert [event["step"] for event in facts["events"]] == list(range(0, 32, 4))
    assert {event["total_rank"] for event in facts["events"]} == {16}
    linears = 2 * 8 * (32 + 32) + 2 * 8 * (32 + 16)
    assert facts["trainable_start"] == linears + 7 * 4 * 64
    assert facts["this_run"]["statistics"] == round(12 * 0.75 * facts["trainable_start"])
    decayed = check(settings, method={"disabled_state": "decay"})
    assert decayed.facts["this_run"]["statistics"] == 0


def test_only_shortcuts_or_single_ones(settings: dict[str, Any]) -> None:
    alone = check(settings, adapter={"target_modules": []}, method={"mode": "combined"})
    assert alone.problems == [] and alone.facts["modules"] == 7
    chosen = {"modules": ["residual_1", "model.layers.1.shortcut_ffn"]}
    assert check(settings, adapter={"shortcuts": chosen}).facts["shortcuts"] == 3
    wrong = check(settings, adapter={"shortcuts": {"modules": ["model.layers.0.shortcut_ffn", "residual_3"]}})
    assert len(wrong.problems) == 1
    for item in ("model.layers.0.shortcut_ffn", "residual_3"):
        assert f"{item!r} is no shortcut of this model" in wrong.problems[0]
    assert "the first layer has no shortcut_ffn" in wrong.problems[0]


def test_no_target_without_shortcuts_is_a_problem(settings: dict[str, Any]) -> None:
    del settings["adapter"]["shortcuts"]
    (problem,) = check(settings, adapter={"target_modules": []}).problems
    assert "adapter.target_modules=[] matches no linear layer" in problem


def test_rows_by_name_leave_the_events_open(settings: dict[str, Any]) -> None:
    report = check(settings, data={"train": "tatsu-lab/alpaca"}, train={"max_steps": 40})
    assert report.problems == [] and "events" not in report.facts
    assert any("length of an epoch" in note for note in report.notes)
    steps = {"interval": 10, "interval_unit": "steps"}
    known = check(settings, data={"train": "tatsu-lab/alpaca"}, train={"max_steps": 40}, method=steps)
    assert [event["step"] for event in known.facts["events"]] == [0, 10, 20, 30]


def test_budgets_and_combinations_that_make_no_sense(settings: dict[str, Any]) -> None:
    (problem,) = check(settings, method={"keep": 0.01}).problems
    assert "method.keep=0.01 of 11 modules is less than one" in problem
    with pytest.raises(ConfigError, match=r"unknown key 'adapter.shortcuts.modulse': did you mean 'modules'"):
        check(settings, adapter={"shortcuts": {"modulse": []}})
    settings["speed"] = {"compile_layers": True}
    with pytest.raises(ConfigError, match="set speed.compile_layers to false"):
        check(settings, method={"proxy": "synflow"})
    settings["method"] = {"name": "salientlora", "target_rank": 2}
    with pytest.raises(ConfigError, match="adapter.shortcuts works with.*'salientlora': remove the section"):
        check(settings)


def test_layers_are_found_by_number() -> None:
    names = [f"model.decoder.layers.{i}.self_attn.q_proj" for i in range(12)]
    found = select_shortcuts(shortcut_candidates(names), ["shortcut_ffn"])
    assert found == [f"model.decoder.layers.{i}.shortcut_ffn" for i in range(1, 12)]
    with pytest.raises(ValueError, match="no numbered layers"):
        shortcut_candidates(["encoder.dense"])
