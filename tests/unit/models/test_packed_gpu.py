"""On a GPU: attention by segments and logits at targets only, against single examples and all logits, in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from salient_ds.models import target_head
from salient_ds.models.target_head import INDEX, target_index, use_target_head
from salient_ds.models.varlen_attention import BORDERS, borders, use_varlen_attention
from tests.unit.models.packing_cases import examples, packed, tiny

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


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_segments_see_what_single_examples_see(kind: str, compiled: bool) -> None:
    masked, varlen = model(kind), model(kind)
    batch = packed("sdpa")
    expected = loss_and_gradient(masked, batch)
    assert use_varlen_attention(varlen, DEVICE)
    if compiled:
        for layer in varlen.model.layers:
            layer.forward = torch.compile(layer.forward)
    for given in (batch, batch | {BORDERS: borders(batch["position_ids"])}):
        loss, grad = loss_and_gradient(varlen, given)
        assert loss == pytest.approx(expected[0], rel=5e-3) and close(grad, expected[1])
    with torch.no_grad():
        alone = [varlen(input_ids=torch.tensor(e["input_ids"], device=DEVICE)[None]).logits[0] for e in examples()]
        together = varlen(**{name: value.to(DEVICE) for name, value in batch.items()}).logits
    first = alone[0]  # the first example is the first of the first row
    assert close(together[0, : len(first)].float(), first.float())


@pytest.mark.parametrize("chunk", [8, 1024])
def test_logits_at_targets_give_the_loss_of_all(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_head, "CHUNK", chunk)
    whole, targets, batch = model(), model(), packed("sdpa")
    for each in (whole, targets):
        each.lm_head.weight.requires_grad_(False)
    expected = loss_and_gradient(whole, batch)
    assert use_target_head(targets)
    loss, grad = loss_and_gradient(targets, batch | {INDEX: target_index(batch["labels"])})
    assert loss == pytest.approx(expected[0], rel=2e-3) and close(grad, expected[1])
