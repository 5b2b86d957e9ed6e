"""The penalty's analytic gradient against autograd of the plain expression."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from salient_ds.adapters.orthogonality import OrthogonalityPenalty
from salient_ds.adapters.ranked_linear import SVDLinear

MASK = torch.tensor([True, True, False, True])


class Stack(nn.Module):
    """Three adapters in a row, optionally recomputed in backward."""

    def __init__(self, penalty: OrthogonalityPenalty, masked: bool, checkpointing: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            SVDLinear(nn.Linear(6, 6), 4, 1.0, init_std=0.4, penalty=penalty) for _ in range(penalty.num_modules)
        )
        self.checkpointing = checkpointing
        for slot, layer in enumerate(self.layers):
            layer.penalty_slot = slot
            layer.lora_E.data.normal_()
            if masked:
                layer.rank_mask_R.copy_(MASK)
                layer.gated = True

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointing == "none":
                x = torch.tanh(layer(x))
            else:
                x = torch.utils.checkpoint.checkpoint(
                    lambda y, lay=layer: torch.tanh(lay(y)), x, use_reentrant=self.checkpointing == "reentrant"
                )
        return x.square().sum()


def plain_penalty(model: Stack, coefficient: float, form: str, masked: bool) -> tuple[Tensor, Tensor]:
    identity = torch.diag(MASK.float()) if masked else torch.eye(4)
    keep = MASK.float() if masked else torch.ones(4)
    norms = []
    for layer in model.layers:
        a, b = layer.lora_A * keep[:, None], layer.lora_B * keep
        norms += [(a @ a.t() - identity).norm(), (b.t() @ b - identity).norm()]
    stacked = torch.stack(norms)
    value = coefficient * (stacked.square().sum() if form == "squared" else stacked.mean())
    return value, stacked.view(-1, 2)


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["mean_norm", "squared"])
def test_gradient_and_value_equal_autograd(
    form: Literal["mean_norm", "squared"], masked: bool, checkpointing: str
) -> None:
    penalty = OrthogonalityPenalty(3, 0.3, form)
    model = Stack(penalty, masked, checkpointing)
    x = torch.randn(5, 6, requires_grad=checkpointing == "reentrant")
    scale = 8.0  # as with an fp16 loss scale
    penalty.arm(scale, torch.device("cpu"))
    (model(x) * scale).backward()
    penalty.disarm()
    mine = {n: p.grad.clone() / scale for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.checkpointing = "none"
    value, norms = plain_penalty(model, 0.3, form, masked)
    (model(x) + value).backward()
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[1].startswith("lora_"):
            assert parameter.grad is not None
            torch.testing.assert_close(mine[name], parameter.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(penalty.value(), value.detach())
    assert penalty.norms_M2 is not None
    torch.testing.assert_close(penalty.norms_M2, norms.detach())


def test_accumulation_adds_the_penalty_once() -> None:
    """Armed for the last micro-batch only, the gradient of two passes holds it once."""
    penalty = OrthogonalityPenalty(1, 0.3, "mean_norm")
    model = Stack(penalty, False, "none")
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    model(x).backward()
    penalty.arm(1.0, torch.device("cpu"))
    model(y).backward()
    penalty.disarm()
    mine: Any = model.layers[0].lora_A.grad.clone()
    model.zero_grad()
    (model(x) + model(y) + plain_penalty(model, 0.3, "mean_norm", False)[0]).backward()
    torch.testing.assert_close(mine, model.layers[0].lora_A.grad)


def test_an_orthogonal_factor_has_no_gradient_and_no_nan() -> None:
    penalty = OrthogonalityPenalty(1, 1.0, "mean_norm")
    model = Stack(penalty, False, "none")
    layer = model.layers[0]
    layer.lora_A.data = torch.eye(6)[:4].clone()
    layer.lora_B.data = torch.eye(6)[:, :4].clone()
    layer.lora_E.data.zero_()
    penalty.arm(1.0, torch.device("cpu"))
    model(torch.randn(2, 6)).backward()
    assert layer.lora_A.grad is not None and not layer.lora_A.grad.any()


def test_coefficient_zero_is_measured_but_not_added() -> None:
    penalty = OrthogonalityPenalty(2, 0.0, "mean_norm")
    model = Stack(penalty, False, "none")
    x = torch.randn(5, 6)
    penalty.arm(1.0, torch.device("cpu"))
    model(x).backward()
    mine = model.layers[1].lora_B.grad.clone()
    penalty.disarm()
    model.zero_grad()
    model(x).backward()
    assert torch.equal(mine, model.layers[1].lora_B.grad)
    assert penalty.norms_M2 is not None and penalty.norms_M2.all()
