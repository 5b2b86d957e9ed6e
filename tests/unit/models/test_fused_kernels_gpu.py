"""On a GPU: loss and gradients of an adapted LLaMA with liger-kernel's kernels are those without them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salient_ds.adapters.inject import AdaptedModel, inject
from salient_ds.adapters.options import AdapterConfig
from salient_ds.config.speed import SpeedConfig
from salient_ds.methods.salientlora.options import SalientLoRAConfig
from salient_ds.models.kernels import apply_kernels, loss_only

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

DEVICE = torch.device("cuda")
METHOD = SalientLoRAConfig(target_rank=2)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture(autouse=True)
def transformers_as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Needs the library; what "all" exchanges in transformers' module is put back."""
    pytest.importorskip("liger_kernel")
    from transformers.models.llama import modeling_llama

    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    yield


def llama(vocab: int = 500, hidden: int = 64, layers: int = 2) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.08, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def adapted(model: nn.Module, dtype: torch.dtype, pack: bool = True) -> AdaptedModel:
    """Adapters that act: every trained value is drawn anew, the same in each model."""
    found = inject(model, AdapterConfig(rank=4, target_modules=MODULES), METHOD, 0, dtype, DEVICE)
    if pack:
        found.pack()
    draw = torch.Generator().manual_seed(1)
    for parameter in found.trained.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    found.trained.train()
    return found


def batch(vocab: int = 500, size: tuple[int, int] = (3, 33)) -> dict[str, Tensor]:
    """Prompts of different length without targets."""
    ids_BS = torch.randint(3, vocab, size, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    labels_BS = ids_BS.clone()
    labels_BS[0, :5] = labels_BS[1:2, :20] = -100
    return {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "labels": labels_BS}


def step(model: AdaptedModel, inputs: dict[str, Tensor], weight: float = 3.0) -> tuple[Any, Tensor]:
    """The output, and all gradients of ``weight`` times its loss as one vector (the engine weighs the loss too)."""
    out = model.trained(**inputs)
    parameters = [p for p in model.trained.parameters() if p.requires_grad]
    grads = torch.autograd.grad(out.loss * weight, parameters)
    return out, torch.cat([grad.float().flatten() for grad in grads])


@pytest.mark.parametrize("before", [True, False], ids=["kernels-first", "adapters-first"])
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("liger", ["loss", "all"])
def test_loss_and_gradients(liger: str, dtype: torch.dtype, pack: bool, before: bool) -> None:
    speed = SpeedConfig.model_validate({"liger": liger})
    base, inputs = llama().to(DEVICE, dtype), batch()
    fused_base = copy.deepcopy(base)
    out, grads = step(adapted(base, dtype, pack), inputs)  # first: "all" changes the rotary embedding of both
    if before:
        apply_kernels(fused_base, speed, DEVICE)
    model = adapted(fused_base, dtype, pack)
    if not before:
        apply_kernels(fused_base, speed, DEVICE)
    fused_out, fused_grads = step(model, inputs)
    assert out.logits is not None and fused_out.logits is None
    if dtype == torch.float32:
        torch.testing.assert_close(fused_out.loss, out.loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(fused_grads, grads, rtol=1e-3, atol=1e-4 * float(grads.abs().max()))
    else:
        torch.testing.assert_close(fused_out.loss.float(), out.loss.float(), rtol=5e-3, atol=5e-3)
        assert torch.nn.functional.cosine_similarity(fused_grads, grads, dim=0) > 0.995
        torch.testing.assert_close(fused_grads.norm(), grads.norm(), rtol=0.03, atol=0)


def test_loss_is_the_mean_over_targets_and_a_batch_without_any_has_no_gradient() -> None:
    base = llama().to(DEVICE)
    apply_kernels(base, SpeedConfig(liger="loss"), DEVICE)
    model, inputs = adapted(base, torch.float32), batch()
    whole = model.trained(**inputs).loss
    rows = [{key: value[i : i + 1] for key, value in inputs.items()} for i in range(3)]
    counts = [int((row["labels"][:, 1:] != -100).sum()) for row in rows]
    summed = sum(model.trained(**row).loss * count for row, count in zip(rows, counts, strict=True))
    torch.testing.assert_close(summed / sum(counts), whole, rtol=1e-5, atol=1e-5)
    out, grads = step(model, inputs | {"labels": torch.full_like(inputs["labels"], -100)})
    assert not bool(out.loss.nan_to_num().any()) and not bool(grads.nan_to_num().any())


def test_evaluation_has_the_same_loss_without_logits() -> None:
    speed = SpeedConfig(liger="loss")
    base = llama().to(DEVICE)
    plain = copy.deepcopy(base).eval()
    apply_kernels(base, speed, DEVICE)
    base.eval()
    with torch.no_grad():
        fused, expected = base(**batch(), **loss_only(speed)), plain(**batch())
    assert fused.logits is None
    torch.testing.assert_close(fused.loss, expected.loss, rtol=1e-5, atol=1e-5)


def test_logits_are_never_whole() -> None:
    inputs, peaks = batch(32000, (1, 4096)), []
    for liger in ("none", "loss"):
        base = llama(32000, layers=1).to(DEVICE, torch.bfloat16)
        apply_kernels(base, SpeedConfig.model_validate({"liger": liger}), DEVICE)
        model = adapted(base, torch.bfloat16)
        step(model, inputs)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step(model, inputs)
        peaks.append(torch.cuda.max_memory_allocated() - held)
        del base, model
    assert peaks[0] > 4096 * 32000 * 6, "plain: at least bf16 logits and their fp32 copy"
    assert peaks[1] < peaks[0] / 8
