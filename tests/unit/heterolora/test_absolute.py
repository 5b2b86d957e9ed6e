"""SYNFLOW's network by substitution equals one whose weights were overwritten; nothing is left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from salient_ds.heterolora.absolute import AbsoluteParameters, gradients
from tests.unit.heterolora import shortcut_models as models


def ones(model: Any) -> dict[str, torch.Tensor]:
    inputs = dict(models.batch())
    tokens = inputs.pop("input_ids")
    width = model.get_input_embeddings().embedding_dim
    return inputs | {"inputs_embeds": torch.ones(*tokens.shape, width, dtype=model.dtype)}


def factors(adapted: Any) -> list[torch.nn.Parameter]:
    return [a.parameter for adapter in adapted.adapters.values() for a in adapter.factors().values()]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["llama", "opt-post", "opt-pre", "gemma", "qwen3"])
def test_equal_to_overwritten_weights(name: str, checkpointing: bool) -> None:
    adapted = models.adapt(models.make(name), name, warm=True)
    model: Any = adapted.model.eval()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules():
            module.training = bool(getattr(module, "gradient_checkpointing", False))
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with AbsoluteParameters():
        loss = model(**ones(model)).loss
        found = gradients(loss, factors(adapted))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    plain = float(model(**ones(model)).loss.detach())

    overwritten = models.adapt(models.make(name), name, warm=True)
    with torch.no_grad():
        for parameter in overwritten.model.parameters():
            parameter.abs_()
    expected_loss = overwritten.model.eval()(**ones(model)).loss
    expected = torch.autograd.grad(expected_loss, factors(overwritten))
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert abs(plain - float(loss.detach())) > 1e-5
    for mine, theirs, parameter in zip(found, expected, factors(adapted), strict=True):
        torch.testing.assert_close(mine, theirs * parameter.sign(), rtol=1e-4, atol=1e-9)


def test_another_linear_in_torchs_place_is_put_back() -> None:
    """DeepSpeed leaves its own in F.linear once a ZeRO-3 model has been loaded; no mode sees calls of it."""
    original = F.linear

    def other(*args: Any) -> torch.Tensor:
        raise AssertionError("the absolute network went past the mode")

    F.linear = other  # type: ignore[assignment]
    try:
        layer, x = torch.nn.Linear(3, 2).requires_grad_(False), torch.rand(4, 3, requires_grad=True)
        with AbsoluteParameters():
            found = layer(x)
        assert F.linear is other
    finally:
        F.linear = original
    torch.testing.assert_close(found, x @ layer.weight.abs().T + layer.bias.abs())
    (gradient,) = torch.autograd.grad(found.sum(), x)
    torch.testing.assert_close(gradient, layer.weight.abs().sum(0).expand(4, 3))
