"""A base of more layers than there are buffers, sharded: every layer is fetched again and again, and losses show it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import scenario
from tests.dist.scenario import Case, advance, build
from tests.support.spawn import spawn
from tests.support.tiny import make_llama

SHARDED = {"zero3": "sharded_base", "compaction": "none"}
OFFLOAD = {"offload_param": {"device": "cpu", "pin_memory": False}}
WHOLE = Case(2, speed={"compaction": "none"})
CASES = [
    WHOLE,
    Case(3, speed=SHARDED),
    Case(3, speed=SHARDED, train={"activation_checkpointing": "all"}),
    Case(3, speed=SHARDED, train={"activation_checkpointing": "selective"}),
    Case(3, speed=SHARDED, zero=OFFLOAD),
]
BF16 = [Case(2, "bf16", speed={"compaction": "none"}), Case(3, "bf16", speed=SHARDED)]


@pytest.fixture(scope="module")
def five_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("deep") / "llama", layers=5)


@pytest.fixture(scope="module")
def two(five_layers: Path) -> list[Any]:
    return spawn(2, scenario.run, five_layers, CASES + BF16)


@pytest.mark.parametrize("index", range(1, len(CASES)), ids=lambda i: f"{CASES[i].zero}-{CASES[i].train}")
def test_sharded_and_whole_bases_give_the_same_run(two: list[Any], index: int) -> None:
    for process in two:
        assert process[index]["losses"] == pytest.approx(process[0]["losses"], rel=1e-4)
        assert process[index]["digests"] == process[0]["digests"]


def test_in_bf16_too(two: list[Any]) -> None:
    whole, sharded = two[0][len(CASES)], two[0][len(CASES) + 1]
    assert sharded["losses"] == pytest.approx(whole["losses"], rel=1e-3)


def _hold(global_rank: int, world_size: int, model: Path) -> dict[str, Any]:
    """What a process keeps of the base, a step in evaluation mode, and a step after it."""
    engine = build(Case(3, speed=SHARDED), model, world_size)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in _layer_parameters(engine)}
    tokens, _ = scenario.example(0, 3)
    engine.engine.eval()
    with torch.no_grad():
        logits = engine.engine(input_ids=tokens).logits
    again = engine.engine(input_ids=tokens).logits  # a graph that is never walked back
    losses, _ = advance(engine, 2, global_rank, world_size)
    return {"storages": storages, "logits": logits, "again": again.detach(), "losses": losses}


def _layer_parameters(engine: Any) -> list[torch.Tensor]:
    layers = engine.adapted.model.model.layers
    return [p for p in layers.parameters() if not p.requires_grad]


def test_layers_take_turns_in_two_buffers_and_evaluation_does_not_disturb_training(
    five_layers: Path, two: list[Any]
) -> None:
    from transformers import AutoModelForCausalLM

    found = spawn(2, _hold, five_layers)
    model = AutoModelForCausalLM.from_pretrained(five_layers)
    one_layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    tokens, _ = scenario.example(0, 3)
    wanted = model(tokens).logits.detach()
    for process in found:
        assert len(process["storages"]) == 2
        assert max(process["storages"].values()) < 1.3 * one_layer  # alignment and padding
        torch.testing.assert_close(process["logits"], wanted)
        torch.testing.assert_close(process["again"], wanted)
        assert process["losses"] == pytest.approx(two[0][1]["losses"][:2])


@pytest.mark.slow
def test_compiled_layers_read_the_right_weights_on_their_way_back(five_layers: Path, two: list[Any]) -> None:
    cases = [Case(3, speed=SHARDED | {"compile_layers": True})]
    (first, second) = spawn(2, scenario.run, five_layers, cases, timeout=600)
    for process in (first, second):
        assert process[0]["losses"] == pytest.approx(two[0][0]["losses"], rel=1e-4)
        assert process[0]["digests"] == two[0][0]["digests"]
