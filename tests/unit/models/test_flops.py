"""Counted operations agree with what PyTorch executes, and with numbers worked by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from salient_ds.adapters.inject import AdaptedModel, inject
from salient_ds.adapters.options import AdapterConfig
from salient_ds.methods.lora.options import LoRAConfig
from salient_ds.methods.lora2.options import LoRA2Config
from salient_ds.methods.options import MethodConfig
from salient_ds.models.flops import AttentionKind, ModelFlops, NotCounted, count_flops
from salient_ds.models.target_head import use_target_head
from tests.support.tiny_architectures import tiny_config

BATCH, SEQ, RANK = 2, 12, 4
TOKENS = BATCH * SEQ


def adapted_model(
    model_type: str, method: MethodConfig | None = None, targets: Any = "all-linear", **changes: Any
) -> AdaptedModel:
    """A tiny model with adapters, whose attention computes hidden pairs too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = tiny_config(model_type)
    for name, value in changes.items():
        setattr(config, name, value)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model.config.use_cache = False
    return inject(model, AdapterConfig(rank=RANK, target_modules=targets), method or LoRAConfig(), 0, torch.float32)


def executed(adapted: AdaptedModel) -> int:
    """What the matrix products of a step really are."""
    tokens_BS = torch.randint(7, 96, (BATCH, SEQ), generator=torch.Generator().manual_seed(0))
    adapted.model.train()
    with FlopCounterMode(display=False) as counter:
        adapted.model(input_ids=tokens_BS, labels=tokens_BS).loss.backward()
    return int(counter.get_total_flops())


def every_pair(flops: ModelFlops, adapted: AdaptedModel) -> int:
    """The counted step, if every token saw every other."""
    seen = sum(kind.flops * flops.pairs(SEQ, kind.window) for kind in flops.attention) * BATCH
    step = flops.step([SEQ] * BATCH, 0, flops.adapters(adapted.layout.ranks))
    return step - seen + sum(kind.flops for kind in flops.attention) * BATCH * SEQ * SEQ


def unneeded(adapted: AdaptedModel, names: str, width: int = RANK) -> int:
    """Gradients of the first adapted layer's input, which nothing below it needs."""
    first = [
        a for name, a in adapted.adapters.items() if name.endswith(("q_proj", "k_proj", "v_proj")) and names in name
    ]
    assert len(first) == 3
    return sum(2 * (a.in_features * a.out_features + width * a.in_features) for a in first) * TOKENS


ROTARY = 2 * TOKENS * 8
"""Positions times frequencies: in some versions a matrix product."""


@pytest.mark.parametrize("method", [LoRAConfig(), LoRAConfig(form="svd"), LoRA2Config(target_rank=2, inner_width=3)])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "olmo2"])
def test_the_count_is_what_a_step_executes(model_type: str, method: MethodConfig) -> None:
    adapted = adapted_model(model_type, method)
    expected = every_pair(count_flops(adapted.model, adapted.adapters), adapted)
    expected -= unneeded(adapted, ".layers.0.", getattr(method, "inner_width", RANK))
    assert 0 <= executed(adapted) - expected <= ROTARY


def test_layers_below_the_first_adapter_are_only_run_forward() -> None:
    adapted = adapted_model("llama", targets=r"re:.*layers\.1\..*_proj")
    flops = count_flops(adapted.model, adapted.adapters)
    assert 0 <= executed(adapted) - (every_pair(flops, adapted) - unneeded(adapted, ".layers.1.")) <= ROTARY
    everywhere = adapted_model("llama")
    whole = count_flops(everywhere.model, everywhere.adapters)
    assert flops.per_token < whole.per_token and flops.attention[0].flops == whole.attention[0].flops * 4 // 6


def test_what_is_trained_in_full_costs_its_gradient_too() -> None:
    adapted = adapted_model("llama")
    before = count_flops(adapted.model, adapted.adapters).per_token
    adapted.model.lm_head.weight.requires_grad_(True)
    assert count_flops(adapted.model, adapted.adapters).per_token == before + 2 * 96 * 32


def test_experts_count_with_the_share_that_a_token_is_sent_to() -> None:
    adapted = adapted_model("mixtral", targets=["q_proj", "v_proj"])
    found = dict.fromkeys((1, 2), 0)
    for chosen in found:
        adapted.model.config.num_experts_per_tok = chosen
        found[chosen] = count_flops(adapted.model, adapted.adapters).per_token
    experts = sum(p.numel() for name, p in adapted.model.named_parameters() if ".experts." in name)
    assert experts and found[2] - found[1] == 4 * experts // 4, "four experts"
    adapted.model.config.num_experts_per_tok = 0
    with pytest.raises(NotCounted, match="how many of its experts"):
        count_flops(adapted.model, adapted.adapters)


def test_convolutions_that_are_matrices_count_and_embeddings_do_not() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
    layer = sum(p.numel() for name, p in model.named_parameters() if ".h." in name and p.dim() == 2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert count_flops(model, {}).per_token == 2 * layer + 4 * 96 * 32, "nothing trains below the head"
    assert count_flops(model, {}).causal


def test_a_head_at_targets_only_counts_targets() -> None:
    adapted = adapted_model("llama")
    whole = count_flops(adapted.model, adapted.adapters)
    assert use_target_head(adapted.model)
    flops = count_flops(adapted.model, adapted.adapters)
    assert (flops.per_token, flops.per_target) == (whole.per_token - 4 * 96 * 32, 4 * 96 * 32)
    assert whole.step([10], 3, 0) - flops.step([10], 3, 0) == 7 * 4 * 96 * 32


def test_attention_by_hand() -> None:
    flops = ModelFlops(0, 0, 0, (), (AttentionKind(None, 10), AttentionKind(3, 1)), True)
    assert flops.step([5], 0, 0) == 15 * 10 + (1 + 2 + 3 + 3 + 3)
    assert flops.step([2, 3], 0, 0) == 9 * 10 + 9, "packed examples do not see each other"
    both = ModelFlops(0, 0, 0, (), (AttentionKind(None, 10),), False)
    assert both.step([5], 0, 0) == 250


def test_windows_and_layers_without_attention_are_read_from_the_configuration() -> None:
    llama = count_flops(adapted_model("llama").model, {})
    assert llama.attention == (AttentionKind(None, 2 * 12 * 4 * 8),), "two layers of four heads"
    gemma = count_flops(adapted_model("gemma3_text", layer_types=["sliding_attention", "full_attention"]).model, {})
    assert {kind.window for kind in gemma.attention} == {16, None}
    assert {kind.window for kind in count_flops(adapted_model("mistral").model, {}).attention} == {16}
    latent = count_flops(adapted_model("deepseek_v3").model, {})
    assert latent.attention == (AttentionKind(None, 2 * 6 * 4 * (16 + 8)),), "queries 8 + 8, values 8"


def test_rows_that_are_off_cost_nothing() -> None:
    flops = ModelFlops(0, 0, 7, (100, 10), (), True)
    assert flops.adapters([2, 0]) == 207 and flops.step([5], 0, 207) == 5 * 207


def test_encoder_decoder_models_are_not_counted() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4))
    with pytest.raises(NotCounted, match="different tokens"):
        count_flops(model, {})


def test_encoders_see_both_ways() -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16)
    assert not count_flops(BertForSequenceClassification(config), {}).causal
