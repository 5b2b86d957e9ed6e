"""Logits at target positions only: the loss and its gradients are those of the whole forward pass."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from salient_ds.config.speed import SpeedConfig, speed_problems
from salient_ds.models import target_head
from salient_ds.models.target_head import INDEX, MODEL_TYPES, target_index, use_target_head, uses_target_head
from tests.support.methods import OPTIONS
from tests.support.tiny_architectures import tiny_model


def batch(targets: float = 0.3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(6, 90, (3, 24), generator=draw)
    labels = torch.where(torch.rand(tokens.shape, generator=draw) < targets, tokens, -100)
    return {"input_ids": tokens, "labels": labels}


def losses(model: Any, inputs: dict[str, torch.Tensor], trained: str) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.train()
    model.zero_grad()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    loss = model(**inputs).loss
    (loss * 3).backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("trained", ["q_proj", "lm_head", "norm"])
@pytest.mark.parametrize("chunk", [5, 1024])
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_loss_and_gradients_are_those_of_all_logits(
    kind: str, chunk: int, trained: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head frozen, in chunks; the head trained, at once."""
    monkeypatch.setattr(target_head, "CHUNK", chunk)
    model, inputs = tiny_model(kind), batch()
    trained = {"q_proj": "self_attn.qkv_proj" if kind == "phi3" else "q_proj"}.get(trained, trained)
    if trained == "lm_head" and model.config.tie_word_embeddings:
        trained = "embed_tokens"
    expected = losses(model, inputs, trained)
    assert use_target_head(model) and uses_target_head(model)
    for given in (inputs, inputs | {INDEX: target_index(inputs["labels"])}):
        found = losses(model, given, trained)
        torch.testing.assert_close(found[0], expected[0], rtol=3e-7, atol=0)
        assert len(found[1]) == len(expected[1]) > 0
        for mine, theirs in zip(found[1], expected[1], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """Rows of the largest tensor that is as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            wide = isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == 96
            if wide and tensor.shape != (32, 96):  # the head's weight, transposed
                self.rows = max(self.rows, tensor.numel() // 96)
        return out


def test_logits_of_other_positions_and_of_all_targets_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_head, "CHUNK", 8)
    model, inputs = tiny_model("llama"), batch()
    with Largest() as before:
        losses(model, inputs, "q_proj")
    use_target_head(model)
    with Largest() as after:
        losses(model, inputs, "q_proj")
    targets = int((inputs["labels"][:, 1:] != -100).sum())
    assert before.rows >= 3 * 24 > targets > after.rows == 8


def test_low_precision_rounds_as_before() -> None:
    model, inputs = tiny_model("llama").bfloat16(), batch()
    expected, theirs = losses(model, inputs, "q_proj")
    use_target_head(model)
    found, mine = losses(model, inputs, "q_proj")
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    for a, b in zip(mine, theirs, strict=True):
        assert float((a.float() - b.float()).norm() / b.float().norm()) < 0.02


def test_evaluation_generation_and_calls_without_labels_are_as_before() -> None:
    model, inputs = tiny_model("llama"), batch()
    model.eval()
    with torch.no_grad():
        expected = model(**inputs)
        tokens = model.generate(inputs["input_ids"][:1], max_new_tokens=3, do_sample=False)
        signature = inspect.signature(model.forward)
        use_target_head(model)
        found = model(**inputs, **{INDEX: target_index(inputs["labels"])})
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
        assert torch.equal(model.generate(inputs["input_ids"][:1], max_new_tokens=3, do_sample=False), tokens)
    assert inspect.signature(model.forward) == signature
    model.train()
    assert model(input_ids=inputs["input_ids"]).logits.shape == (3, 24, 96)


def test_a_batch_without_targets_keeps_its_graph() -> None:
    model = tiny_model("llama")
    use_target_head(model)
    inputs = batch(targets=0.0)
    loss = model.train()(**inputs).loss
    assert loss.isnan()
    (loss.nan_to_num() * 0.0).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite", "gpt_neox", "t5"])
def test_unusual_heads_stay_as_they_are(kind: str) -> None:
    model = torch.nn.Linear(2, 2) if kind == "t5" else tiny_model(kind)
    before = model.forward
    assert not use_target_head(model) and not uses_target_head(model)
    assert model.forward == before


def test_one_loss_is_enough() -> None:
    (problem,) = speed_problems(SpeedConfig(liger="loss", target_head=True), OPTIONS["lora"], 2)
    assert "both replace the loss: use one" in problem
