"""Adding shortcuts to a model: names, addresses, copies, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from salient_ds.adapters.inject import AdaptedModel, inject
from salient_ds.adapters.options import AdapterConfig, ShortcutConfig
from salient_ds.heterolora.injection import add_shortcuts
from salient_ds.heterolora.options import HeteroLoRAConfig
from salient_ds.heterolora.shortcut import KINDS, Shortcut
from salient_ds.heterolora.shortcut_wiring import shortcut_layers, shortcut_names
from salient_ds.methods.lora.options import LoRAConfig
from tests.unit.heterolora.shortcut_models import adapt, all_equal, make, outputs


def test_nothing_dense_is_stored() -> None:
    """Per shortcut two factors of the rank; nothing frozen, and no buffer but the mask."""
    plain = make("llama")
    before = sum(t.numel() for t in plain.state_dict().values())
    adapted = adapt(plain, "llama")
    shortcuts = [m for m in adapted.adapters.values() if isinstance(m, Shortcut)]
    assert len(shortcuts) == 11
    assert all(set(dict(m.named_parameters())) == {"lora_A", "lora_B"} for m in shortcuts)
    after = sum(t.numel() for t in adapted.model.state_dict().values())
    assert after - before == sum(adapted.parameters_M)
    assert adapted.parameters_M[-11:] == (2 * 2 * 16,) * 11
    assert adapted.parameters_M[:2] == (2 * (16 + 16), 2 * (16 + 8))


def test_layout_and_addresses() -> None:
    """Linear layers first, then shortcuts; each looks like any other adapter."""
    adapted = adapt(make("llama"), "llama")
    assert list(adapted.adapters)[6:] == shortcut_names(adapted.model)
    assert list(adapted.adapters)[:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert "model.layers.0.shortcut_ffn" not in adapted.adapters
    assert adapted.layout.modules == tuple(adapted.adapters)
    assert set(adapted.layout.in_features) == {16}
    parameters = dict(adapted.model.named_parameters())
    for path, module in adapted.adapters.items():
        assert adapted.model.get_submodule(path) is module
        for factor, address in module.factors().items():
            assert parameters[f"{path}.lora_{factor}"] is address.parameter
            assert address.shape == tuple(address.parameter.shape)
            assert address.shape[address.rank_axis or 0] == module.rank
    mask_M = torch.tensor([k % 2 == 0 for k in range(17)])
    assert mask_M[adapted.layout.module_of_row_N].tolist() == [k % 2 == 0 for k in range(17) for _ in range(2)]
    assert "kind" not in repr(adapted.adapters[f"{list(shortcut_layers(adapted.model))[0]}.residual_1"])


def test_copies_are_independent() -> None:
    first = adapt(make("llama"), "llama", warm=True)
    expected = outputs(first.model)
    second = copy.deepcopy(first)
    for module in second.adapters.values():
        module.factors()["B"].parameter.data.zero_()
    assert not all_equal(outputs(second.model), expected)
    assert all_equal(outputs(first.model), expected)
    layers: Any = first.model.model.layers  # type: ignore[union-attr]
    assert layers[0].carrier is layers[1].carrier is not second.model.model.layers[0].carrier  # type: ignore


def test_a_pass_that_fails_leaves_nothing_behind() -> None:
    adapted = adapt(make("llama"), "llama", warm=True)
    expected = outputs(adapted.model)
    layers: Any = adapted.model.model.layers  # type: ignore[union-attr]
    assert layers[0].carrier.u_BTD is None

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    handle = layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        adapted.model(input_ids=torch.ones(1, 3, dtype=torch.int64))
    handle.remove()
    assert all_equal(outputs(adapted.model), expected)


def test_dropout_acts_on_the_update_only() -> None:
    adapted = adapt(make("llama"), "llama", warm=True, dropout=0.5, modules=["residual_1"])
    module = adapted.adapters["model.layers.1.residual_1"].train()
    x = torch.randn(3, 16)
    torch.manual_seed(0)
    noisy = module(x) - x
    assert not torch.allclose(noisy, module.eval()(x) - x)
    module.set_mask(torch.zeros(2, dtype=torch.bool), gate=True)
    assert torch.equal(module.train()(x), x)


def adapter_config(**options: Any) -> AdapterConfig:
    return AdapterConfig(**{"rank": 2, "target_modules": ["q_proj"], **options})


def build(model: Any, modules: Sequence[str] = KINDS, **options: Any) -> AdaptedModel:
    adapter = adapter_config(shortcuts=ShortcutConfig(rank=2, modules=list(modules)), **options)
    adapted = inject(model, adapter, HeteroLoRAConfig(), 0, torch.float32)
    add_shortcuts(adapted, adapter, 0, torch.float32)
    return adapted


def test_shortcuts_alone() -> None:
    adapted = build(make("llama"), ["shortcut_sa", "model.layers.2.residual_2"], target_modules=[])
    assert [n.removeprefix("model.layers.") for n in adapted.adapters] == [
        "0.shortcut_sa", "1.shortcut_sa", "2.residual_2", "2.shortcut_sa",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="matches no linear layer"):
        inject(make("llama"), adapter_config(target_modules=[]), LoRAConfig(), 0, torch.float32)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("residual1", "'residual1' is no shortcut of this model, did you mean 'residual_1'"),
        ("model.layers.3.residual_1", "did you mean 'model.layers.[012].residual_1'"),
        ("model.layers.0.shortcut_ffn", "the first layer has no shortcut_ffn"),
    ],
)
def test_unknown_shortcuts(wanted: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(make("llama"), [wanted])


def test_models_without_a_definition() -> None:
    other = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, n_positions=8))
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no layer that shortcuts are defined for"):
        build(other, target_modules=[])


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("opt-pre", "layerdrop", 0.1, "layerdrop=0.1"),
        ("roberta", "add_cross_attention", True, "cross attention"),
        ("roberta", "chunk_size_feed_forward", 4, "chunk_size_feed_forward to 0"),
    ],
)
def test_models_with_parts_that_do_not_fit(name: str, key: str, value: Any, message: str) -> None:
    model = make(name)
    setattr(model.config, key, value)
    with pytest.raises(ValueError, match=message):
        build(model, target_modules=[])


def test_layers_of_the_same_name_from_elsewhere_are_left_alone() -> None:
    """The equation is that of transformers' class; custom code may do something else under the same name."""
    model = make("llama")
    for layer in model.model.layers:
        layer.__class__ = type("LlamaDecoderLayer", (type(layer),), {})
    with pytest.raises(ValueError, match="no layer that shortcuts are defined for"):
        build(model)
