"""On a GPU: attention by segments and logits at targets only, against single examples and all logits, in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from salient_ds.models import target_head
from salient_ds.models.target_head import INDEX, target_index, use_target_head
from salient_ds.models.varlen_attention import BORDERS, borders, use_varlen_attention
from tests.unit.models.packing_cases import examples, packed, tiny, together

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
DEVICE = torch.device("cuda")


def model(kind: str = "llama") -> Any:
    changes = {"layer_types": ["full_attention"] * 2, "use_sliding_window": False, "sliding_window": None}
    return tiny(kind, "sdpa", **changes).to(DEVICE, torch.bfloat16).train()


def loss_and_gradient(found: Any, batch: dict[str, torch.Tensor]) -> tuple[float, torch.Tensor]:
    weight = found.model.layers[0].self_attn.q_proj.weight
    loss = found(**{name: value.to(DEVICE) for name, value in batch.items()}).loss
    (grad,) = torch.autograd.grad(loss, weight)
    return float(loss.detach()), grad.float()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error. bf16 itself costs 0.02 to 0.05 here, whatever attends (eager and compiled masks on a CPU)."""
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_segments_see_what_single_examples_see(kind: str, compiled: bool) -> None:
    exact, varlen = model(kind).float(), model(kind)
    batch = packed("sdpa")
    expected = loss_and_gradient(exact, batch)  # dense masks in fp32
    assert use_varlen_attention(varlen, DEVICE)
    if compiled:
        for layer in varlen.model.layers:
            layer.forward = torch.compile(layer.forward)
    for given in (batch, batch | {BORDERS: borders(batch["position_ids"])}):
        loss, grad = loss_and_gradient(varlen, given)
        assert loss == pytest.approx(expected[0], rel=5e-3) and error(grad, expected[1]) < 0.08
    packed_batch = {name: value.to(DEVICE) for name, value in batch.items()}
    for one, found in zip(examples(), together(varlen, packed_batch), strict=True):
        with torch.no_grad():
            alone = exact(input_ids=torch.tensor(one["input_ids"], device=DEVICE)[None]).logits[0]
        assert error(found, alone) < 0.08


@pytest.mark.parametrize("chunk", [8, 1024])
def test_logits_at_targets_give_the_loss_of_all(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_head, "CHUNK", chunk)
    whole, targets, batch = model(), model(), packed("sdpa")
    for each in (whole, targets):
        each.lm_head.weight.requires_grad_(False)
    expected = loss_and_gradient(whole, batch)
    assert use_target_head(targets)
    loss, grad = loss_and_gradient(targets, batch | {INDEX: target_index(batch["labels"])})
    assert loss == pytest.approx(expected[0], rel=2e-3) and error(grad, expected[1]) < 0.03
