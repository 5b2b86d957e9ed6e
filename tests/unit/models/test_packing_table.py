"""Which models may pack: the page shows the table, check and training refuse everything else, assembling uses it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.check.preflight import preflight
from salient_ds.config.run import ModelConfig, parse_config
from salient_ds.models.attention import NAME
from salient_ds.models.loading import refuse_unfit
from salient_ds.models.packing import GROUPS, REFUSED, packing_problems
from salient_ds.run.assemble import assemble
from tests.unit.models.packing_cases import alone, difference, packed, tiny, together

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "salient_ds" / "models" / "README.md"
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
LONG_ROPE = {"type": "longrope", "original_max_position_embeddings": 500}


def problems(config: dict[str, Any], **model: Any) -> list[str]:
    return packing_problems(ModelConfig(path="base", **model), config, 512)


def test_the_page_shows_the_tables() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.read_text().splitlines()]
    tested = [row for row in rows if len(row) == 4 and row[0] in ("full", "window", "chunk")]
    assert tested == [
        [group.layers, ", ".join(group.attention), "model" if group.own_masks else "ours", ", ".join(group.names)]
        for group in GROUPS
    ]
    refused = [row for row in rows if len(row) == 2 and row[0] in REFUSED]
    assert refused == [[why, ", ".join(names.split())] for why, names in REFUSED.items()]


def test_no_architecture_is_named_twice() -> None:
    names = [name for group in GROUPS for name in group.names]
    names += [name for known in REFUSED.values() for name in known.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mistral", "sliding_window": 16},
        {"model_type": "llama", "rope_parameters": YARN},
        {"model_type": "phi3", "rope_scaling": LONG_ROPE | {"original_max_position_embeddings": 512}},
        {"model_type": "granitemoehybrid", "layer_types": ["attention", "attention"]},
        {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "sliding_window": 16}},
        {"model_type": "gemma4_text", "use_bidirectional_attention": "vision"},
        {"model_type": "llama4_text", "floor_scale": 8192},
        {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "own.Model"}},
        {},
    ],
)
def test_accepted(config: dict[str, Any]) -> None:
    assert problems(config) == []


@pytest.mark.parametrize(
    ("config", "model", "message"),
    [
        ({"model_type": "qwen3_next"}, {}, "model_type='qwen3_next' has recurrent layers, which carry state"),
        ({"model_type": "lfm2"}, {}, "model_type='lfm2' has convolutions"),
        ({"model_type": "new"}, {}, "model_type='new' was not tested with packed examples"),
        ({"model_type": "llama4_text"}, {"attn_implementation": "flash_attention_2"}, "choose sdpa or eager, or set"),
        ({"model_type": "gpt_oss"}, {}, "not tested equal with model.attn_implementation=sdpa: choose eager, or set"),
        (
            {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "own.Model"}},
            {"trust_remote_code": True},
            "the code that comes with base .model.trust_remote_code=true. was not tested",
        ),
        ({"model_type": "gemma", "use_bidirectional_attention": True}, {}, "attends to later tokens too"),
        ({"model_type": "llama", "is_causal": False}, {}, "attends to later tokens too"),
        ({"model_type": "granitemoehybrid", "layer_types": ["mamba", "attention"]}, {}, "layers of type mamba"),
        ({"model_type": "mixtral", "output_router_logits": True}, {}, "output_router_logits=true"),
        ({"model_type": "phi3", "rope_scaling": LONG_ROPE}, {}, "data.max_length=512 is above 500, .*rotary"),
        (
            {"model_type": "gemma3_text", "rope_parameters": {"full_attention": LONG_ROPE}},
            {},
            "data.max_length=512 is above 500",
        ),
        (
            {"model_type": "llama", "rope_scaling": {"rope_type": "dynamic"}, "max_position_embeddings": 256},
            {},
            "data.max_length=512 is above 256",
        ),
        ({"model_type": "llama4_text", "floor_scale": 512}, {}, "512 is above 511, .*position in the row"),
    ],
)
def test_refused(config: dict[str, Any], model: dict[str, Any], message: str) -> None:
    (found,) = problems(config, **model)
    pytest.raises(ValueError, _raise, found).match(message)
    assert found.startswith("data.packing=true: ") and found.endswith("set data.packing=false")


def _raise(message: str) -> None:
    raise ValueError(message)


@pytest.mark.parametrize("kind", ["qwen3_next", "lfm2", "bamba", "bart", "bert"])
def test_control_what_is_refused_differs(kind: str) -> None:
    model = tiny(kind, "eager")
    assert difference(together(model, packed("eager")), alone(model)) > 1e-2


@pytest.fixture
def settings(tmp_path: Path, tiny_llama: Path, tiny_alpaca: Path) -> dict[str, Any]:
    return {
        "output_dir": str(tmp_path / "run"),
        "deepspeed": str(ROOT / "ds_configs" / "zero2.json"),
        "model": {"path": str(tiny_llama)},
        "adapter": {"rank": 4},
        "method": {"name": "lora"},
        "data": {"train": str(tiny_alpaca), "max_length": 128, "packing": True},
        "train": {"max_steps": 3, "global_batch_size": 4, "micro_batch_size": 2, "lr": 1e-3, "precision": "fp32"},
    }


def test_check_and_training_refuse(settings: dict[str, Any], tmp_path: Path, tiny_llama: Path) -> None:
    run = parse_config(settings)
    assert preflight(run).problems == []
    refuse_unfit(run)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "lfm2", "num_hidden_layers": 2}))
    changed = settings | {"model": {"path": str(other), "tokenizer": str(tiny_llama), "random_weights": True}}
    run = parse_config(changed)
    for quick in (False, True):
        assert any("'lfm2' has convolutions" in problem for problem in preflight(run, quick=quick).problems)
    with pytest.raises(ValueError, match="'lfm2' has convolutions.*set data.packing=false"):
        refuse_unfit(run)
    refuse_unfit(parse_config(changed | {"data": settings["data"] | {"packing": False}}))


class Stop(Exception):
    """Raised when the engine would be built."""


@pytest.mark.parametrize("packing", [True, False])
def test_runs_that_pack_keep_transformers_masks(settings: dict[str, Any], packing: bool) -> None:
    settings["data"]["packing"] = packing
    model: Any = tiny("llama", "sdpa")

    def stop(*_: Any) -> None:
        raise Stop

    with pytest.raises(Stop):
        assemble(model, parse_config(settings), {}, 3, torch.device("cpu"), make_engine=stop)
    assert model.config._attn_implementation == ("sdpa" if packing else NAME)
    assert packing == (difference(together(model, packed("sdpa")), alone(model)) < 1e-5)
