"""The SVD-form adapter: no change when fresh, masks that switch rows off for good, right-to-left evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from salient_ds.adapters.inject import inject, module_generator
from salient_ds.adapters.low_rank import low_rank_linear
from salient_ds.adapters.options import AdapterConfig
from salient_ds.adapters.ranked_linear import PlainLinear, SVDLinear
from salient_ds.methods.lora.options import LoRAConfig
from salient_ds.methods.salientlora.options import SalientLoRAConfig

SALIENT = SalientLoRAConfig(target_rank=2)


def filled(rank: int = 5, inner: int = 7, outer: int = 6, **options: Any) -> SVDLinear:
    torch.manual_seed(1)
    adapter = SVDLinear(nn.Linear(inner, outer), rank, 0.5, init_std=0.3, **options)
    adapter.lora_E.data.normal_()
    return adapter


def test_a_fresh_model_equals_the_base_model_exactly(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(3, 43).view(2, 20)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for method in (SALIENT, LoRAConfig(), LoRAConfig(form="svd")):
        adapted = AutoModelForCausalLM.from_pretrained(tiny_llama)
        inject(adapted, AdapterConfig(rank=4), method, 0, torch.float32)
        with torch.no_grad():
            assert torch.equal(adapted(tokens).logits, base(tokens).logits)


def test_forward_is_the_papers_formula() -> None:
    adapter = filled()
    x_BI = torch.randn(3, 4, 7)
    delta_OI = 0.5 * adapter.lora_B @ torch.diag(adapter.lora_E) @ adapter.lora_A
    expected = adapter.base(x_BI) + x_BI @ delta_OI.t()
    torch.testing.assert_close(adapter(x_BI), expected)


def test_a_masked_row_gives_and_gets_nothing() -> None:
    adapter = filled()
    adapter.rank_mask_R.copy_(torch.tensor([True, False, True, True, False]))
    adapter.gated = True
    x_BI = torch.randn(8, 7)
    smaller = filled()
    keep = adapter.rank_mask_R
    small = SVDLinear(smaller.base, 3, 0.5)
    small.lora_A.data, small.lora_E.data = adapter.lora_A.data[keep], adapter.lora_E.data[keep]
    small.lora_B.data = adapter.lora_B.data[:, keep]
    small.base = adapter.base
    torch.testing.assert_close(adapter(x_BI), small(x_BI))
    adapter(x_BI).square().sum().backward()
    assert adapter.lora_E.grad is not None and adapter.lora_A.grad is not None and adapter.lora_B.grad is not None
    assert not adapter.lora_E.grad[~keep].any() and adapter.lora_E.grad[keep].all()
    assert not adapter.lora_A.grad[~keep].any() and not adapter.lora_B.grad[:, ~keep].any()


def test_nothing_as_large_as_the_weight_is_made() -> None:
    """Evaluated right to left: autograd keeps no tensor with in x out elements."""
    adapter = SVDLinear(nn.Linear(64, 48), 2, 1.0)
    saved: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.numel())
        return tensor

    x_BI = torch.randn(5, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        adapter(x_BI)
    saved.remove(adapter.base.weight.numel())  # the frozen product itself
    assert max(saved) < 64 * 48


def test_dropout_is_on_the_adapters_input_only() -> None:
    adapter = filled(dropout=0.5)
    x_BI = torch.randn(6, 7)
    torch.manual_seed(3)
    dropped = F.dropout(x_BI, 0.5)
    torch.manual_seed(3)
    expected = adapter.base(x_BI) + (dropped @ adapter.lora_A.t() * adapter.lora_E * 0.5) @ adapter.lora_B.t()
    torch.testing.assert_close(adapter(x_BI), expected)
    adapter.eval()
    torch.testing.assert_close(adapter(x_BI), adapter(x_BI))


def test_the_start_depends_on_seed_and_path_only() -> None:
    def first(name: str, seed: int) -> float:
        return float(torch.randn(1, generator=module_generator(seed, name)))

    assert first("a.b", 0) == first("a.b", 0)
    assert len({first("a.b", 0), first("a.c", 0), first("a.b", 1)}) == 3


def test_bert_and_t5_take_adapters() -> None:
    """Nothing assumes a causal model: names differ, and T5 looks at ``wo.weight.dtype``."""
    from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

    bert = BertForSequenceClassification(
        BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    ).eval()
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    ).eval()
    tokens = torch.arange(1, 9).view(1, 8)
    for model, modules, inputs in (
        (bert, ["query", "value", "dense"], {"input_ids": tokens}),
        (t5, "all-linear", {"input_ids": tokens, "decoder_input_ids": tokens}),
    ):
        with torch.no_grad():
            before = model(**inputs).logits
            adapted = inject(model, AdapterConfig(rank=2, target_modules=modules), SALIENT, 0, torch.float32)
            assert torch.equal(model(**inputs).logits, before)
        assert len(adapted.adapters) >= 6
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trainable and all("lora_" in name for name in trainable)


def test_a_target_that_is_nowhere_is_an_error_with_the_names_there_are(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(ValueError, match=r"(?s)out_proj.*o_proj"):
        inject(model, AdapterConfig(rank=2, target_modules=["q_proj", "out_proj"]), SALIENT, 0, torch.float32)


def test_plain_lora_starts_at_zero_and_rslora_scales_by_the_root() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    plain = inject(
        model, AdapterConfig(rank=4, alpha=8, target_modules=["0"]), LoRAConfig(rslora=True), 0, torch.float32
    )
    (adapter,) = plain.adapters.values()
    assert isinstance(adapter, PlainLinear)
    assert adapter.scaling == 4.0 and not adapter.lora_B.any() and adapter.lora_A.all()


@pytest.mark.parametrize("bias", [True, False])
def test_the_fused_function_returns_no_view(bias: bool) -> None:
    """llama4 adds to the output of its shared experts in place."""
    torch.manual_seed(0)
    x_BTI, W_OI, A_RI, gain_R, B_OR = (torch.randn(*s) for s in ((2, 3, 5), (4, 5), (2, 5), (2,), (4, 2)))
    A_RI.requires_grad_()
    out = low_rank_linear(x_BTI, W_OI, torch.ones(4) if bias else None, A_RI, gain_R, B_OR)
    expected = x_BTI @ W_OI.T + bias + (x_BTI @ A_RI.T * gain_R) @ B_OR.T
    torch.testing.assert_close(out, expected)
    out.add_(1).sum().backward()
    torch.testing.assert_close(A_RI.grad, torch.autograd.grad(expected.sum(), A_RI)[0])
