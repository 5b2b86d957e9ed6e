"""Adapted matrices are found on disk by transformers' own rules of loading, or refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from salient_ds.export.base_files import open_base
from salient_ds.export.disk_names import locate_weights
from tests.support.tiny_architectures import tiny_config


def saved(kind: str, folder: Path, class_name: str = "") -> Path:
    """A tiny checkpoint with random weights, as transformers saves it."""
    import transformers

    torch.manual_seed(0)
    config = tiny_config(kind)
    if class_name:
        getattr(transformers, class_name)._from_config(config).save_pretrained(folder)
    else:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def found(folder: Path, *modules: str, task_type: str = "CAUSAL_LM") -> dict[str, str]:
    return locate_weights(modules, open_base(folder).file_of, folder, task_type)


def test_names_that_only_differ_by_prefix(tmp_path: Path) -> None:
    folder = saved("gemma3", tmp_path)
    text, vision = "model.language_model.layers.1.mlp.up_proj", "model.vision_tower.encoder.layers.0.mlp.fc1"
    expected = {
        text: "language_model.model.layers.1.mlp.up_proj.weight",
        vision: "vision_tower.encoder.layers.0.mlp.fc1.weight",
    }
    assert found(folder, text, vision) == expected
    # published checkpoints have a prefix that is dropped while loading, and that saving cannot know
    older = [key.replace("vision_tower.", "vision_tower.vision_model.") for key in open_base(folder).file_of]
    expected[vision] = "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"
    assert locate_weights([text, vision], older, folder, "CAUSAL_LM") == expected


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_neox"])
def test_every_linear_layer_is_found_and_loads_from_there(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.support.linears import linear_modules

    folder = saved(kind, tmp_path)
    stored = load_file(folder / "model.safetensors")
    layers = linear_modules(AutoModelForCausalLM.from_pretrained(folder))
    keys = found(folder, *layers)
    assert set(keys) == set(layers) and len(set(keys.values())) == len(keys)
    for name, layer in layers.items():
        assert torch.equal(stored[keys[name]], layer.weight)


def test_a_text_model_out_of_a_multimodal_checkpoint(tmp_path: Path) -> None:
    folder = saved("qwen3_5", tmp_path, "Qwen3_5ForConditionalGeneration")
    name = "model.layers.3.self_attn.q_proj"
    assert found(folder, name) == {name: "model.language_model.layers.3.self_attn.q_proj.weight"}


def test_names_that_are_another_tensors_name(tmp_path: Path) -> None:
    """The rules decide, not equality: what is called fc1 on disk may be fc2 in the model."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import GroupWeightRename

    folder = saved("opt", tmp_path)
    prefix = "model.decoder.layers.0."
    shifted = [key.replace("fc1", "fc0").replace("fc2", "fc1") for key in open_base(folder).file_of]
    rule = GroupWeightRename([r"layers.(\d+).fc0", r"layers.(\d+).fc1"], [r"layers.\1.fc1", r"layers.\1.fc2"])
    conversion_mapping.register_checkpoint_conversion_mapping("opt", [rule])
    try:
        keys = locate_weights([f"{prefix}fc1", f"{prefix}fc2"], shifted, folder, "CAUSAL_LM")
    finally:
        del conversion_mapping._checkpoint_conversion_mapping_cache["opt"]
        conversion_mapping.USER_REGISTERED_MAPPINGS.discard("opt")
    assert keys == {f"{prefix}fc1": f"{prefix}fc0.weight", f"{prefix}fc2": f"{prefix}fc1.weight"}


@pytest.mark.parametrize("part", ["q_proj", "v_proj"])  # the first and the last of those that a tensor is split into
def test_a_part_of_a_tensor_is_refused(tmp_path: Path, part: str) -> None:
    folder = saved("hrm_text", tmp_path)
    name = f"model.L_module.layers.0.self_attn.{part}"
    pattern = (
        rf"1 adapted modules are only a part of a tensor .*{part} \(model.L_module.layers.0.attn.gqkv_proj.weight\)"
    )
    with pytest.raises(ValueError, match=pattern + ".*export it as peft"):
        found(folder, name)
    other = "model.L_module.layers.0.self_attn.o_proj"
    assert found(folder, other) == {other: "model.L_module.layers.0.attn.o_proj.weight"}


def test_a_shared_weight_is_refused(tmp_path: Path) -> None:
    folder = saved("zamba2", tmp_path)
    name = "model.layers.{}.shared_transformer.self_attn.q_proj"
    pattern = (
        r"1 adapted modules share their weight with another: .*layers.1.* \(with model.layers.3.*Merging would change"
    )
    with pytest.raises(ValueError, match=pattern):
        found(folder, name.format(1))
    assert found(folder, "model.layers.0.mamba.in_proj")


def test_modules_that_are_not_there(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path)
    with pytest.raises(
        ValueError, match=r"1 adapted modules have no weight .*layers.7.mlp.up_proj \(nearest: model.layers"
    ):
        found(folder, "model.layers.7.mlp.up_proj")
    keys = [*open_base(folder).file_of, "layers.0.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"could be layers.0.mlp.up_proj.weight, model.layers.0.mlp.up_proj.weight"):
        locate_weights(["model.layers.0.mlp.up_proj"], keys, folder, "CAUSAL_LM")


def test_models_that_transformers_cannot_build(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "novel"}')
    keys = ["layers.0.q.weight"]
    assert locate_weights(["model.layers.0.q"], keys, tmp_path, "CAUSAL_LM") == {"model.layers.0.q": keys[0]}


def test_the_class_follows_from_the_task(tmp_path: Path) -> None:
    import transformers

    config: Any = transformers.BertConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    transformers.BertModel(config).save_pretrained(tmp_path)
    name = "bert.encoder.layer.0.attention.self.query"
    for task in ("SEQ_CLS", "QUESTION_ANS", "CAUSAL_LM"):
        assert found(tmp_path, name, task_type=task) == {name: f"{name.removeprefix('bert.')}.weight"}
