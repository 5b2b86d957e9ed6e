"""Attention that is told of no padding: the same training, and nobody asks the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from salient_ds.models.attention import MODEL_TYPES, NAME, leave_out_masks

SIZES = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {"opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0}}
GROUPED = {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": None}


def model(kind: str, attention: str = "sdpa", **changes: Any) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **(SIZES | OPTIONS.get(kind, GROUPED) | changes))
    config.use_cache = False
    torch.manual_seed(0)
    made: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return made.train()


def padded() -> dict[str, Tensor]:
    """Rows of 16, 9 and 4 tokens, padded on the right."""
    ids_BS = torch.randint(3, 99, (3, 16), generator=torch.Generator().manual_seed(1))
    mask_BS = (torch.arange(16)[None] < torch.tensor([16, 9, 4])[:, None]).long()
    return {"input_ids": ids_BS, "attention_mask": mask_BS, "labels": ids_BS.masked_fill(mask_BS == 0, -100)}


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_losses_and_gradients_are_those_with_masks(kind: str) -> None:
    with_masks = model(kind)
    without = copy.deepcopy(with_masks)
    assert leave_out_masks(without, CPU)
    losses = []
    for one in (with_masks, without):
        loss = one(**padded()).loss
        loss.backward()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for (name, expected), found in zip(with_masks.named_parameters(), without.parameters(), strict=True):
        if expected.grad is not None:
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_nobody_looks_for_padding(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own questions to the device are not reached; without the change they are."""
    from transformers import masking_utils

    def asked(*args: Any, **options: Any) -> None:
        raise AssertionError("waited for the device")

    for question in ("sdpa_mask", "find_packed_sequence_indices"):
        monkeypatch.setattr(masking_utils, question, asked)
    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", asked)
    made, batch = model(kind), padded()
    with pytest.raises(AssertionError, match="waited"):
        made(**batch)
    assert leave_out_masks(made, CPU)
    made(**batch)
    made(**{name: value for name, value in batch.items() if name != "attention_mask"})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_forward_pass_does_not_wait_for_the_device() -> None:
    made = model("llama").to("cuda", torch.bfloat16)
    batch = {name: value.cuda() for name, value in padded().items()}
    assert leave_out_masks(made, torch.device("cuda"))
    made(**batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        made(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def own_code() -> nn.Module:
    """A model that says it is a LLaMA and may do what it likes with its mask."""
    from transformers import LlamaConfig, LlamaForCausalLM

    class Own(LlamaForCausalLM):
        pass

    return Own(LlamaConfig(**(SIZES | {"intermediate_size": 64})))


def test_grouped_heads_in_fp32_keep_their_masks_on_gpus() -> None:
    gpu = torch.device("cuda")
    assert not leave_out_masks(model("llama"), gpu)
    assert leave_out_masks(model("llama", num_key_value_heads=4), gpu)
    assert leave_out_masks(model("llama").bfloat16(), gpu)
    assert leave_out_masks(model("opt"), gpu)


@pytest.mark.parametrize(
    "other",
    [
        lambda: model("llama", "eager"),
        lambda: model("mistral", sliding_window=4),
        lambda: model("qwen2", layer_types=["full_attention", "sliding_attention"], use_sliding_window=True),
        lambda: model("llama", is_causal=False),
        lambda: model("gemma", use_bidirectional_attention=True),
        lambda: model("gpt_neox", rotary_pct=0.5),
        lambda: own_code(),
    ],
    ids=["eager", "sliding window", "some layers slide", "not causal", "bidirectional", "unknown", "own code"],
)
def test_other_attention_keeps_its_masks(other: Any) -> None:
    made = other()
    before = made.config._attn_implementation
    assert not leave_out_masks(made, CPU)
    assert made.config._attn_implementation == before != NAME
