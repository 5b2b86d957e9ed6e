"""Processes that do not start from the same: the message names process, host and first difference."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from salient_ds.config.run import load_config
from salient_ds.run.same_everywhere import NodesDiffer, _Place, describe, first_difference, setup_facts, sizes, sources
from tests.launcher.runs import write_run
from tests.support.spawn import spawn

FACTS: dict[str, Any] = {
    "version": {"torch": "2.9", "deepspeed": "0.19"},
    "code": {"salient_ds": "aa", "deepspeed": "bb"},
    "sizes of the code": {"torch": "cc"},
    "run file": {"train": {"lr": 0.1, "betas": [0.9, 0.99], "patience": None}},
    "base weights": "cc",
    "number of training rows": 2000,
}


def changed(place: str, value: Any) -> dict[str, Any]:
    facts = copy.deepcopy(FACTS)
    *outer, last = place.split("/")
    inner = facts
    for name in outer:
        inner = inner[name]
    inner[last] = value
    return facts


@pytest.mark.parametrize(
    ("place", "value", "key"),
    [
        ("version/torch", "2.8", "version: torch"),
        ("code/deepspeed", "ba", "code: deepspeed"),
        ("run file/train/lr", 0.5, "run file: train.lr"),
        ("run file/train/betas", [0.9, 0.98], "run file: train.betas"),
        ("run file/train/patience", 3, "run file: train.patience"),
        ("run file/train/more", 1, "run file: train.more"),
        ("base weights", "cd", "base weights"),
        ("number of training rows", 1500, "number of training rows"),
    ],
)
def test_first_difference(place: str, value: Any, key: str) -> None:
    for here, main in ((changed(place, value), FACTS), (FACTS, changed(place, value))):
        found = first_difference(main, here)
        assert found is not None
        assert found.key == key
    assert first_difference(FACTS, copy.deepcopy(FACTS)) is None


def test_what_one_process_does_not_know_is_not_compared() -> None:
    assert first_difference(FACTS, changed("base weights", None)) is None
    assert first_difference(changed("base weights", None), FACTS) is None


def test_the_message_says_which_process_is_the_odd_one() -> None:
    one = _Place("nodeb", "run file: train.lr", "0.5", "0.1")
    text = describe("nodea", 4, {2: one, 3: one})
    assert text.startswith("process 2 on nodeb does not have what process 0 on nodea has: run file: train.lr is 0.5 on")
    assert "2 of 4 processes differ from it, on nodeb" in text
    assert "process 0 is the odd one" in describe("nodea", 3, {1: one, 2: one})
    assert "odd one" not in describe("nodea", 2, {1: one})


def test_the_facts_of_a_run_follow_its_files(tiny_llama: Path, tiny_alpaca: Path, tmp_path: Path) -> None:
    ds = tmp_path / "zero.json"
    ds.write_text('{"zero_optimization": {"stage": 1}}')
    run = write_run(tmp_path / "a", tiny_llama, tiny_alpaca, deepspeed=str(ds))
    facts = setup_facts(load_config(str(run), []))
    assert first_difference(facts, json.loads(json.dumps(facts))) is None
    assert all(value is not None for value in facts.values())
    ds.write_text('{"zero_optimization": {"stage": 2}}')
    found = first_difference(facts, setup_facts(load_config(str(run), [])))
    assert found == ("ZeRO JSON: zero_optimization.stage", 1, 2)


def test_sources_cover_every_file_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "patched_package" / "inner"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("")
    (folder / "deep.py").write_text("a = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    before = sources("patched_package")
    assert list(before) == ["__init__.py", "inner/deep.py"]
    assert sizes("patched_package") == {"__init__.py": 0, "inner/deep.py": 5}
    (folder / "deep.py").write_text("a = 2")
    after = sources("patched_package")
    assert [name for name in before if before[name] != after[name]] == ["inner/deep.py"]
    assert sources("json").keys() >= {"decoder.py"}
    sys.modules.pop("patched_package", None)


def differing(global_rank: int, world_size: int) -> list[str]:
    """The message on this process for equal facts, and for each kind of difference."""
    import torch

    from salient_ds.run import same_everywhere

    def said(facts: dict[str, Any]) -> str:
        try:
            same_everywhere.refuse_differing(facts, torch.device("cpu"))
        except NodesDiffer as error:
            return str(error)
        return ""

    other = global_rank == 1
    tables = {"a.py": "1", "engine/b.py": "2" if other else "3"}
    same_everywhere.sources = lambda package: tables
    same_everywhere.sizes = lambda package: {"a.py": 1, "nn/linear.py": 7 if other else 8}
    return [
        said(FACTS),
        said(changed("base weights", None) if other else FACTS),
        said(changed("run file/train/lr", 0.5) if other else FACTS),
        said(changed("code/salient_ds", "ab") if other else FACTS),
        said(changed("sizes of the code/torch", "cd") if other else FACTS),
    ]


def test_all_processes_are_told_the_same() -> None:
    first, second = spawn(2, differing)
    assert first == second
    equal, unknown, setting, code, patched = first
    assert equal == unknown == ""
    assert "run file: train.lr is 0.5 on process 1 and 0.1 on process 0" in setting
    assert "code: salient_ds is ab" in code
    assert "first file that differs: salient_ds/engine/b.py" in code
    assert "sizes of the code: torch is cd" in patched and "first file that differs: torch/nn/linear.py" in patched
