"""Shortcuts in all architectures: what they change, what they leave alone, and where they are connected."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from salient_ds.adapters.targets import is_shortcut
from salient_ds.heterolora.shortcut import KINDS
from salient_ds.heterolora.shortcut_wiring import shortcut_layers
from tests.unit.heterolora.shortcut_models import MODELS, adapt, all_equal, batch, make, outputs

NAMES = list(MODELS)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_fresh_and_disabled_modules_change_no_bit(name: str, dtype: torch.dtype, training: bool) -> None:
    plain = make(name, dtype).train(training)
    expected = outputs(plain)
    fresh = adapt(copy.deepcopy(plain), name)
    assert all_equal(outputs(fresh.model), expected)
    warm = adapt(copy.deepcopy(plain), name, warm=True)
    assert not all_equal(outputs(warm.model), expected)
    warm.set_mask(torch.zeros(warm.layout.total, dtype=torch.bool), gate=True)
    assert all_equal(outputs(warm.model), expected)
    warm.set_mask(torch.ones(warm.layout.total, dtype=torch.bool), gate=False)
    assert not all_equal(outputs(warm.model), expected)


@pytest.mark.parametrize("name", NAMES)
def test_reuse_is_another_function_even_when_off(name: str) -> None:
    plain = make(name)
    reuse = adapt(copy.deepcopy(plain), name, norm="reuse")
    assert not all_equal(outputs(reuse.model)[1:], outputs(plain)[1:])
    fresh = outputs(reuse.model)
    reuse.set_mask(torch.zeros(reuse.layout.total, dtype=torch.bool), gate=True)
    assert all_equal(outputs(reuse.model), fresh)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_disabled_modules_are_exact_zeros(name: str) -> None:
    adapted = adapt(make(name), name, warm=True)
    on_M = torch.arange(len(adapted.adapters)) % 3 != 1
    adapted.set_mask(on_M[adapted.layout.module_of_row_N], gate=True)
    adapted.model(**batch()).loss.backward()
    for on, (path, module) in zip(on_M.tolist(), adapted.adapters.items(), strict=True):
        for address in module.factors().values():
            grad = address.parameter.grad
            assert grad is not None, path
            assert bool(grad.any()) == on, path
    frozen = [p for p in adapted.model.parameters() if not p.requires_grad]
    assert all(p.grad is None for p in frozen)


@pytest.mark.parametrize("norm", ["none", "reuse"])
@pytest.mark.parametrize("name", NAMES)
def test_a_missing_shortcut_is_a_disabled_one(name: str, norm: str) -> None:
    """So a run that has only the modules that a search chose starts from the function that the search ended with."""
    everything = adapt(make(name), name, norm, warm=True)
    chosen = [n for n in everything.adapters if is_shortcut(n)][1::3]
    on_M = torch.tensor([not is_shortcut(n) or n in chosen for n in everything.adapters])
    everything.set_mask(on_M[everything.layout.module_of_row_N], gate=True)
    few = adapt(make(name), name, norm, modules=chosen)
    assert [n for n in few.adapters if is_shortcut(n)] == chosen
    for path, module in few.adapters.items():
        for factor, address in module.factors().items():
            address.parameter.data = everything.adapters[path].factors()[factor].parameter.data.clone()
    assert all_equal(outputs(few.model), outputs(everything.model))


@pytest.mark.parametrize("name", NAMES)
def test_connections(name: str) -> None:
    """residual_1 and shortcut_sa start from a layer's input, residual_2 and the next shortcut_ffn from its FFN's."""
    adapted = adapt(make(name), name, warm=True)
    seen: dict[str, Tensor] = {}
    layers = shortcut_layers(adapted.model)
    for path in layers:
        for kind in KINDS:
            if f"{path}.{kind}" in adapted.adapters:
                module = adapted.adapters[f"{path}.{kind}"]
                module.register_forward_hook(lambda _m, i, _o, key=f"{path}.{kind}": seen.update({key: i[0]}))
    states = adapted.model(**batch(), output_hidden_states=True).hidden_states
    assert len(seen) == 3 * len(layers) + len(layers) - 1
    previous = None
    for path, state in zip(layers, states, strict=False):
        source = seen[f"{path}.residual_1"]
        assert torch.equal(seen[f"{path}.shortcut_sa"], source)
        assert state.shape != source.shape or torch.equal(state, source)
        ffn_input = seen[f"{path}.residual_2"].view(source.shape)
        assert not torch.equal(ffn_input, source)
        if previous is not None:
            assert torch.equal(seen[f"{path}.shortcut_ffn"], previous)
        previous = ffn_input


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["opt-post", "opt-pre", "roberta", "llama"])
def test_every_kind_reaches_the_loss(name: str, kind: str) -> None:
    """Each kind alone changes the output, and its gradient is the slope of the loss."""
    adapted = adapt(make(name, torch.float64), name, warm=True, modules=[kind])
    weights = torch.randn(2, 7, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    step = 1e-3 if name == "llama" else 1e-5  # llama's norms are float32

    def loss() -> Tensor:
        return (adapted.model(**batch()).logits.double() * weights).sum()

    loss().backward()
    module = adapted.adapters[[n for n in adapted.adapters if is_shortcut(n)][-1]]
    parameter = module.factors()["A"].parameter
    assert parameter.grad is not None
    with torch.no_grad():
        parameter += step * parameter.grad.sign()
        above = loss()
        parameter -= 2 * step * parameter.grad.sign()
        slope = float(above - loss()) / (2 * step)
    found = float(parameter.grad.abs().sum())
    assert found > 1e-3
    assert math.isclose(found, slope, rel_tol=1e-2 if name == "llama" else 1e-6)


def gradients(adapted: Any, passes: int) -> list[Tensor]:
    """Of the summed losses of several passes, all of them made before the first backward."""
    inputs = [{k: v.roll(i, 0) for k, v in batch().items()} for i in range(passes)]
    for i, one in enumerate(inputs):
        one["input_ids"] = (one["input_ids"] * (i + 1)) % 37 + 3
    torch.manual_seed(2)
    losses = [adapted.model(**one).loss for one in inputs]
    torch.stack(losses).sum().backward()
    return [p.grad for p in adapted.model.parameters() if p.requires_grad]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("norm", ["none", "reuse"])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing(name: str, norm: str, reentrant: bool) -> None:
    """Recomputed layers see the source of their own pass, also when two passes wait for their backward."""
    plain = adapt(make(name).train(), name, norm, warm=True)
    expected = gradients(plain, 2)
    assert all(g.any() for g in expected)
    checkpointed = adapt(make(name).train(), name, norm, warm=True)
    model: Any = checkpointed.model
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    recomputed: list[int] = []
    first = next(iter(shortcut_layers(model).values()))
    first.residual_1.register_forward_hook(lambda *_: recomputed.append(1))
    found = gradients(checkpointed, 2)
    assert len(recomputed) == 4  # two passes, each computed twice
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["opt-post", "gemma", "llama", "qwen2"])
def test_decoding_with_a_cache(name: str) -> None:
    """Token by token as all at once."""
    model: Any = adapt(make(name), name, "reuse", warm=True).model
    ids = batch()["input_ids"]
    whole = model(ids).logits
    past, steps = None, []
    for t in range(ids.shape[1]):
        result = model(ids[:, t : t + 1], past_key_values=past, use_cache=True)
        past = result.past_key_values
        steps.append(result.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)


def test_only_what_is_taken_is_handed_on() -> None:
    """An FFN input that no shortcut starts from would cost memory until backward."""

    def handing(norm: str, *modules: str) -> list[bool]:
        model: Any = adapt(make("llama"), "llama", norm, modules=list(modules)).model
        return [layer.hands_on for layer in model.model.layers]

    assert handing("none", "residual_1", "shortcut_sa") == [False, False, False]
    assert handing("none", "residual_1", "model.layers.2.shortcut_ffn") == [False, True, False]
    assert handing("reuse", "residual_1") == [True, True, False]


def test_hooks_that_were_there_before_see_plain_layers() -> None:
    """transformers installs its recording of hidden states with the first pass that asks for it."""
    plain = make("llama")
    expected = outputs(plain)
    seen: list[Any] = []
    plain.model.layers[0].register_forward_hook(lambda _m, _i, output: seen.append(output))
    adapted = adapt(plain, "llama")
    assert all_equal(outputs(adapted.model), expected)
    assert isinstance(seen[-1], Tensor)
