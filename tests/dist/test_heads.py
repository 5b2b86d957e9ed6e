"""Every head and every module trained in full, over families, methods and ZeRO stages, end to end on two processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import heads_worker
from tests.dist.heads_worker import STOP, Cell, probe
from tests.support.spawn import spawn
from tests.support.tiny_heads import TARGETS, make_base
from tests.support.verify import load_model, logits_of

CELLS = {
    "bert-answers-0": Cell("bert", "question-answering", "lora", 0),
    "roberta-classes-3": Cell("roberta", "sequence-classification", "salientlora", 3),
    "deberta-classes-2": Cell("deberta-v2", "sequence-classification", "adalora", 2),
    "deberta-grows": Cell("deberta-v2", "sequence-classification", "increlora", 3),
    "deberta-answers-3": Cell("deberta-v2", "question-answering", "lora2", 3, "partitioned"),
    "bart-summaries-2": Cell("bart", "seq2seq-lm", "salientlora", 2),
    "t5-summaries-3": Cell("t5", "seq2seq-lm", "adalora", 3),
    "t5-everything": Cell("t5", "seq2seq-lm", "lora", 2, adapter={"also_train": ["shared"]}),
    "llama-words": Cell("llama", "causal-lm", "adalora", 3, adapter={"also_train": ["embed_tokens", "lm_head"]}),
    "llama-norms": Cell("llama", "sequence-classification", "salientlora", 3,
                        adapter={"also_train": ["input_layernorm", "layers.1.mlp.gate_proj"]}),
    "llama-bf16": Cell("llama", "sequence-classification", "adalora", 2, precision="bf16"),
    "opt-switches": Cell("opt", "sequence-classification", "heterolora", 2),
}  # fmt: skip
ALONE = ["deberta-classes-2", "bart-summaries-2", "llama-words"]
FULL = {
    "bert-answers-0": ("qa_outputs",),
    "roberta-classes-3": ("classifier",),
    "deberta-classes-2": ("pooler", "classifier"),
    "bart-summaries-2": (),
    "t5-everything": ("shared",),
    "llama-words": ("model.embed_tokens", "lm_head"),
    "llama-norms": ("model.layers.0.input_layernorm", "model.layers.1.mlp.gate_proj",
                    "model.layers.1.input_layernorm", "score"),
}  # fmt: skip
each = pytest.mark.parametrize("key", CELLS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {kind: make_base(folder / kind, kind) for kind in TARGETS}


@pytest.fixture(scope="module")
def two(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawn(2, heads_worker.run, bases, CELLS, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def alone(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    return spawn(1, heads_worker.run, bases, {k: CELLS[k] for k in ALONE}, tmp_path_factory.mktemp("alone"))[0]


@each
def test_modules_in_full_learn_and_have_groups_of_their_own(two: list[Any], key: str) -> None:
    found = two[0][key]
    if key in FULL:
        assert found["full"] == FULL[key]
    assert ("modules" in found["groups"]) == bool(found["full"])
    assert len({*found["losses"]}) == len(found["losses"])
    if found["full"]:
        changed = [not torch.equal(process[key]["start"][name], value)
                   for process in two for name, value in process[key]["end"].items()]  # fmt: skip
        assert changed and all(changed)


@each
def test_resumed_equals_uninterrupted(two: list[Any], key: str) -> None:
    for process in two:
        whole, again = process[key], process[key]["again"]
        assert again["losses"] == whole["losses"][STOP:]
        assert all(torch.equal(again["end"][name], value) for name, value in whole["end"].items())


@pytest.mark.parametrize("key", ALONE)
def test_one_process_does_the_same(two: list[Any], alone: Any, key: str) -> None:
    """Initial values of heads, the weight of every target, and the steps: equal up to the order of sums."""
    assert alone[key]["losses"] == pytest.approx(two[0][key]["losses"], rel=2e-3)


def test_other_processes_and_stages_resume_the_same_files(two: list[Any], bases: dict[str, Path]) -> None:
    places = {"roberta-classes-3": 2, "deberta-answers-3": 0, "llama-norms": 1, "t5-everything": 3}
    jobs = {key: (Cell(**{**vars(CELLS[key]), "stage": stage}), two[0][key]["saved"]) for key, stage in places.items()}
    found = spawn(1, heads_worker.elsewhere, bases, jobs)[0]
    for key in jobs:
        assert found[key]["losses"] == pytest.approx(two[0][key]["losses"][STOP:], rel=5e-3), key


@each
def test_peft_and_transformers_load_the_exports(two: list[Any], bases: dict[str, Path], key: str) -> None:
    """Equal logits, heads and embeddings included, from the adapter and from the merged model."""
    from peft import PeftModel

    cell, found = CELLS[key], two[0][key]
    folder, tolerance = found["exported"]["peft"], 2e-2 if cell.precision == "bf16" else 2e-5
    config = json.loads((folder / "adapter_config.json").read_text())
    base = load_model(bases[cell.kind], config["task_type"], torch.float32) if cell.task in (
        "seq2seq-lm", "causal-lm", "question-answering") else with_labels(bases[cell.kind])  # fmt: skip
    adapted = PeftModel.from_pretrained(base, str(folder)).eval()
    merged = load_model(found["exported"]["merged"], config["task_type"], torch.float32).eval()
    for model in (adapted, merged):
        with torch.no_grad():
            logits = logits_of(model(**probe(cell)))
        assert (logits - found["logits"].float()).abs().max() < tolerance


def with_labels(base: Path) -> Any:
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
