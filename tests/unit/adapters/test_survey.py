"""What is found in real models of transformers, built without weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from salient_ds.adapters.adaptable import Adaptable
from salient_ds.adapters.survey import survey
from tests.support.linears import linear_modules
from tests.support.tiny_architectures import tiny_config


def built(kind: str) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(kind))


def leaves(found: Adaptable) -> set[str]:
    return {name.rpartition(".")[2] for name in found.select("all-linear")}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("mixtral", {"gate_up_proj", "down_proj", "gate_proj", "up_proj", "w1", "w2", "w3"}),
        ("qwen3_moe", {"gate_up_proj", "down_proj", "gate_proj", "up_proj"}),
        ("gpt_oss", {"gate_up_proj", "down_proj", "gate_proj", "up_proj"}),
        ("granitemoe", {"gate_up_proj", "down_proj", "gate_proj", "up_proj"}),
        ("jetmoe", {"input_linear", "output_linear"}),
    ],
)
def test_fused_experts(kind: str, names: set[str]) -> None:
    found = survey(built(kind))
    assert found.experts is not None and set(found.experts.names) == names
    assert (found.experts.experts, found.experts.axes) == (4, 3)
    assert not names & leaves(found)


def test_experts_in_two_axes_and_beside_dense_layers() -> None:
    dbrx = survey(built("dbrx")).experts
    assert dbrx is not None and dbrx.axes == 2 and "ffn.experts" in dbrx.parameters[0]
    deepseek = survey(built("deepseek_v3"))
    assert deepseek.experts is not None and deepseek.experts.parameters[0].startswith("model.layers.1.")
    assert {"gate_proj", "kv_b_proj"} <= leaves(deepseek)
    assert survey(built("llama")).experts is None


@pytest.mark.parametrize(
    ("kind", "towers"),
    [
        ("gemma3", ("model.vision_tower",)),
        ("got_ocr2", ("model.vision_tower", "model.multi_modal_projector")),
        ("moss_transcribe_diarize", ("model.audio_tower", "model.multi_modal_projector")),
        ("fuyu", ("model.vision_embed_tokens",)),
        ("git", ("git.image_encoder", "git.visual_projection")),
        (
            "phi4_multimodal",
            ("model.embed_tokens_extend.image_embed", "model.embed_tokens_extend.audio_embed"),
        ),
        ("whisper", ()),
        ("bert", ()),
        ("blt", ()),
        ("llama", ()),
    ],
)
def test_towers(kind: str, towers: tuple[str, ...]) -> None:
    assert survey(built(kind)).towers == towers


@pytest.mark.parametrize(
    ("kind", "left_out", "reason"),
    [
        ("mamba", {"x_proj", "dt_proj", "out_proj"}, "without calling the layer"),
        ("llama4_text", {"router"}, "Llama4Router computes more than a matrix product"),
        ("phimoe", {"router"}, "computes more"),
        ("bart", {"k_proj", "v_proj", "q_proj", "out_proj"}, "attends to an encoder"),
        ("deepseek_v32", {"wq_b", "wk", "weights_proj"}, "gets no gradient"),
        ("big_bird", {"pooler"}, "does not run it"),
    ],
)
def test_layers_that_no_adapter_can_train(kind: str, left_out: set[str], reason: str) -> None:
    found = survey(built(kind))
    assert {name.rpartition(".")[2] for name in found.unfit} == left_out
    assert all(reason in why for why in found.unfit.values())


def test_layers_that_only_look_special() -> None:
    assert {"dense", "dense_4h_to_h", "query_key_value"} <= leaves(survey(built("bloom")))
    assert {"dense", "query_key_value"} <= leaves(survey(built("falcon")))  # FalconLinear
    assert survey(built("bloom")).unfit == survey(built("falcon")).unfit == {}
    slow = built("bloom")
    slow.config.slow_but_exact = True
    assert leaves(survey(slow)) == {"query_key_value", "dense_h_to_4h"}


def test_the_output_layer_is_left_out() -> None:
    for kind in ("llama", "opt", "gpt_neox", "bert"):
        model = built(kind)
        head = model.get_output_embeddings()
        assert all(module is not head for module in linear_modules(model).values())


def test_a_plain_module() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    assert survey(model) == Adaptable({"0": (3, 2), "2": (1, 3)})


def test_partitioned_parameters_are_measured_whole() -> None:
    model = built("mixtral")
    shapes = {id(parameter): tuple(parameter.shape) for parameter in model.parameters()}
    whole = survey(model)
    for module in model.modules():  # as ZeRO-3 leaves them
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
            shapes[id(empty)] = shapes[id(parameter)]
            setattr(module, name, empty)
    assert survey(model, lambda parameter: shapes[id(parameter)]) == whole
