"""The floor counts every matrix product that a step cannot do without, and nothing else."""

from __future__ import annotations

import pytest
import torch
from salient_eval.bench.floor import matrix_rate, step_flops
from salient_eval.bench.shapes import SHAPES, find_shape
from torch.utils.flop_counter import FlopCounterMode

from salient_ds.adapters.inject import inject
from salient_ds.adapters.options import LLAMA_MODULES, AdapterConfig
from salient_ds.methods.lora.options import LoRAConfig
from salient_ds.methods.lora2.options import LoRA2Config
from salient_ds.methods.options import MethodConfig

LLAMA, TINY = SHAPES["llama-7b"].config, SHAPES["tiny"].config


@pytest.mark.parametrize(
    ("rank", "method"),
    [(1, LoRAConfig(form="svd")), (8, LoRAConfig()), (24, LoRA2Config(target_rank=4, inner_width=6))],
)
def test_count_agrees_with_what_a_step_executes(rank: int, method: MethodConfig) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    batch, seq = 2, 24
    config = LlamaConfig(**{key: value for key, value in TINY.items() if key not in ("model_type", "architectures")})
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    inject(model, AdapterConfig(rank=rank), method, 0, torch.float32)
    tokens_BS = torch.randint(3, 500, (batch, seq))
    model(input_ids=tokens_BS, labels=tokens_BS).loss.backward()  # everything lazy is built before counting
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens_BS, labels=tokens_BS).loss.backward()
    rotary = 2 * batch * seq * (config.head_dim // 2)  # positions times frequencies, in some versions a matrix product
    counted = step_flops(TINY, LLAMA_MODULES, rank, batch, seq, getattr(method, "inner_width", None))
    all_pairs, causal_pairs = seq * seq, seq * (seq + 1) // 2  # eager attention does not skip what the mask hides
    expected = counted.total - counted.attention + counted.attention * all_pairs // causal_pairs
    assert expected <= counter.get_total_flops() <= expected + rotary


def test_llama_7b_in_numbers_worked_by_hand() -> None:
    flops = step_flops(LLAMA, LLAMA_MODULES, 64, 4, 512)
    tokens, layer = 2048, 4 * 4096**2 + 3 * 4096 * 11008
    assert flops.frozen == tokens * (
        4 * 32 * layer - 2 * 3 * 4096**2
    )  # three products of layer 0 need no input gradient
    assert flops.head == tokens * 4 * 4096 * 32000
    ends = 4 * (4096 + 4096) + 3 * (4096 + 11008)
    assert flops.adapters == tokens * 64 * (6 * 32 * ends - 2 * 3 * 4096)
    assert flops.attention == 32 * 12 * 4096 * 4 * 512 * 513 // 2
    assert flops.seconds(790e12) == pytest.approx(0.0716, abs=0.0005)


def test_adapters_grow_with_rank_and_the_rest_does_not() -> None:
    small, large = (step_flops(LLAMA, LLAMA_MODULES, rank, 4, 512) for rank in (64, 480))
    assert large.adapters * 64 == small.adapters * 480
    assert (large.frozen, large.head, large.attention) == (small.frozen, small.head, small.attention)
    assert large.total == sum(large.to_dict().values()) - large.total


def test_unknown_families_and_shapes_are_named() -> None:
    with pytest.raises(ValueError, match="model_type='gpt2'"):
        step_flops({"model_type": "gpt2"}, LLAMA_MODULES, 8, 1, 8)
    with pytest.raises(ValueError, match="llama-8b.*llama-7b"):
        find_shape("llama-8b")


def test_matrix_rate_is_a_positive_rate_of_the_asked_dtype() -> None:
    rate = matrix_rate("cpu", "float32", size=64, repeats=3)
    assert rate["dtype"] == "float32" and rate["size"] == 64
    assert 1e6 < rate["flops_per_second"] < 1e15
