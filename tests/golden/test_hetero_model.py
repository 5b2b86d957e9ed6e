"""HeteroLoRA's modules and models reproduce the released code (see hetero/README.md for what the files hold)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.heterolora.shortcut import Shortcut
from salient_ds.heterolora.switched import SwitchedLinear
from tests.golden.hetero_model import FOLDER, Group, group, other, our_name, short_name, switch, tiny_llama, tiny_opt

CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-12}
FLOAT32: dict[str, Any] = {"rtol": 2e-4, "atol": 1e-5}
"""The reference's LLaMA computes norms, rotary embedding, softmax and loss in float32."""


def npz(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def module(kind: str, golden: Group) -> Any:
    built: Any
    if kind == "lora":
        base = nn.Linear(6, 4, dtype=torch.float64)
        base.weight.data, base.bias.data = golden["lora_W"], golden["lora_b"]
        built = SwitchedLinear(base, 3, 16 / 3, dtype=torch.float64)
    else:
        built = Shortcut("residual_1" if kind == "identity" else "shortcut_sa", 6, 3, 4 / 3, dtype=torch.float64)
    for factor, address in built.factors().items():
        address.parameter.data = golden[f"{kind}_{factor}"].clone()
    return built


@pytest.mark.parametrize("importance", [1.0, 0.3])
@pytest.mark.parametrize("state", ["on", "off"])
@pytest.mark.parametrize("kind", ["lora", "identity", "zeros"])
def test_modules(kind: str, state: str, importance: float) -> None:
    """Outputs and gradients; where the reference has no gradient, ours is exactly zero."""
    golden = npz("modules")
    built = module(kind, golden)
    built.importance = importance
    built.set_mask(torch.full((3,), state == "on"), gate=True)
    letter = "alpha" if kind == "lora" else "beta"
    scaled = importance != 1.0 and (kind == "lora" or state == "on")
    key = f"{kind}_{state}_{letter}{importance}" if scaled else f"{kind}_{state}"
    x = golden["x"].clone().requires_grad_()
    y = built(x)
    y.backward(golden["lora_gy" if kind == "lora" else "sc_gy"])
    torch.testing.assert_close(y, golden[f"{key}_y"], **CLOSE)
    torch.testing.assert_close(x.grad, golden[f"{key}_gx"], **CLOSE)
    for factor, address in built.factors().items():
        expected = golden.get(f"{key}_g{factor}", torch.zeros((), dtype=torch.float64))
        assert address.parameter.grad is not None
        assert (state == "on") == bool(expected.any())
        torch.testing.assert_close(address.parameter.grad, expected.expand(address.shape), **CLOSE)


def opt_batch(case: str) -> dict[str, Tensor]:
    return {key: torch.tensor(other(case, f"batch/{key}")) for key in ("input_ids", "attention_mask", "labels")}


def run(adapted: AdaptedModel, batch: dict[str, Tensor]) -> Any:
    result = adapted.model(**batch, output_hidden_states=True)
    result.loss.backward()
    return result


@pytest.mark.parametrize("case", ["opt_ags_init", "opt_ags_warm"])
def test_opt_with_shortcuts(case: str) -> None:
    golden = group(case, "all_on")
    adapted = tiny_opt(group(case, "w"), shortcuts=True)
    result = run(adapted, opt_batch(case))
    torch.testing.assert_close(result.logits, golden["logits"], **CLOSE)
    torch.testing.assert_close(result.loss, golden["loss"], **CLOSE)
    assert len(result.hidden_states) == 4
    for i, hidden in enumerate(result.hidden_states):
        torch.testing.assert_close(hidden, golden[f"hidden_{i}"], **CLOSE)
    compared = compare_gradients(adapted, group(case, "all_on", "grad"))
    assert compared == 2 * 29


def compare_gradients(adapted: AdaptedModel, golden: Group) -> int:
    """Gradients of all factors; those that the reference lacks must be exact zeros. Returns how many it has."""
    expected = {our_name(name): value for name, value in golden.items() if not name.startswith("score")}
    for name, parameter in adapted.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, expected.get(name, torch.zeros_like(parameter)), **CLOSE)
            assert name in expected or not parameter.grad.any()
    return len(expected)


@pytest.mark.parametrize("case", ["opt_ags_init", "opt_ags_warm"])
def test_opt_with_half_of_the_modules_off(case: str) -> None:
    golden = group(case, "mixed")
    on = dict(zip(other(case, "mixed/mask_names"), other(case, "mixed/mask_on"), strict=True))
    adapted = tiny_opt(group(case, "w"), shortcuts=True)
    switch(adapted, {name.replace("layer_", ""): value for name, value in on.items()})
    result = run(adapted, opt_batch(case))
    torch.testing.assert_close(result.logits, golden["logits"], **CLOSE)
    torch.testing.assert_close(result.loss, golden["loss"], **CLOSE)
    assert compare_gradients(adapted, group(case, "mixed", "grad")) == 2 * sum(on.values())


def test_opt_without_the_additional_norms() -> None:
    """Fresh shortcuts without norms are the plain model of the reference; with them they are not."""
    golden, batch = npz("opt_plain_init"), opt_batch("opt_ags_init")
    weights = group("opt_ags_init", "w")
    plain = tiny_opt(weights, shortcuts=False).model(**batch)
    none = tiny_opt(weights, shortcuts=True, norm="none").model(**batch)
    reuse = tiny_opt(weights, shortcuts=True, norm="reuse").model(**batch)
    torch.testing.assert_close(none.logits, golden["logits"], **CLOSE)
    torch.testing.assert_close(none.loss, golden["loss"], **CLOSE)
    assert torch.equal(none.logits, plain.logits)
    assert (reuse.logits - plain.logits).abs().max() > 0.05


@pytest.mark.parametrize("case", ["init", "warm"])
def test_llama_with_shortcuts(case: str) -> None:
    golden = group("llama_ags", case)
    tokens = torch.tensor(other("llama_ags", "input_ids"))
    adapted = tiny_llama(group("llama_ags", case, "w"), shortcuts=True)
    result = adapted.model(tokens, labels=tokens, output_hidden_states=True)
    torch.testing.assert_close(result.logits.double(), golden["logits"], **FLOAT32)
    torch.testing.assert_close(result.loss.double(), golden["loss"], **FLOAT32)
    for i, hidden in enumerate(result.hidden_states):
        torch.testing.assert_close(hidden, golden[f"hidden_{i}"], **FLOAT32)


def test_llama_without_shortcuts() -> None:
    golden, tokens = group("llama_ags", "plain"), torch.tensor(other("llama_ags", "input_ids"))
    weights = group("llama_ags", "init", "w")
    for adapted in (tiny_llama(weights, False), tiny_llama(weights, True, norm="none")):
        result = adapted.model(tokens, labels=tokens)
        torch.testing.assert_close(result.logits.double(), golden["logits"], **FLOAT32)
        torch.testing.assert_close(result.loss.double(), golden["loss"], **FLOAT32)
    reuse = tiny_llama(weights, True).model(tokens, labels=tokens)
    assert (reuse.logits - golden["logits"]).abs().max() > 2


def test_start_values() -> None:
    """A as the reference: uniform within 1 / sqrt(d); B zero; another draw per module, the same one per seed."""
    adapted = tiny_opt(group("opt_ags_init", "w"), shortcuts=True)
    fresh = [Shortcut("residual_1", 16, 2, 2.0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    A = [s.factors()["A"].parameter for s in fresh]
    assert torch.equal(A[0], A[1])
    assert not torch.equal(A[0], A[2])
    for reference in adapted.adapters.values():
        bound = 1 / math.sqrt(reference.in_features)
        assert bound / 2 < reference.factors()["A"].parameter.abs().max() <= bound
        assert not reference.factors()["B"].parameter.any()
    wide = Shortcut("shortcut_sa", 400, 50, 1.0, generator=torch.Generator().manual_seed(0)).factors()["A"].parameter
    assert 0.999 / 20 < wide.abs().max() <= 1 / 20
    assert abs(float(wide.detach().std()) * 20 * math.sqrt(3) - 1) < 0.02


def test_names() -> None:
    adapted = tiny_opt(group("opt_ags_init", "w"), shortcuts=True)
    names = list(adapted.adapters)
    assert names[18:22] == [f"model.decoder.layers.{t}" for t in
                            ("0.residual_1", "0.residual_2", "0.shortcut_sa", "1.residual_1")]  # fmt: skip
    assert adapted.is_shortcut_M == (False,) * 18 + (True,) * 11
    assert {short_name(n) for n in names} == {
        n.replace("layer_", "") for n in other("opt_ags_init", "mixed/mask_names")
    }
