"""Attention by segments: packed examples have the logits, losses and gradients that they have alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from salient_ds.data.packing import plan_packs
from salient_ds.models.attention import MODEL_TYPES
from salient_ds.models.packing import group_of
from salient_ds.models.target_head import INDEX, target_index, use_target_head
from salient_ds.models.varlen_attention import BORDERS, NAME, borders, use_varlen_attention, uses_varlen_attention
from tests.unit.models.packing_cases import LENGTHS, ROOM, alone, difference, examples, packed, tiny, together

CPU = torch.device("cpu")
KINDS = [kind for kind in MODEL_TYPES if kind != "opt"]


def windowless(kind: str, attention: str = "sdpa") -> Any:
    changes = {"layer_types": ["full_attention"] * 2, "use_sliding_window": False, "sliding_window": None}
    return tiny(kind, attention, **changes)


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_are_those_of_single_examples(kind: str, told: bool) -> None:
    expected = alone(windowless(kind))
    model = windowless(kind)
    assert use_varlen_attention(model, CPU) and uses_varlen_attention(model)
    batch = packed("sdpa")
    if told:
        batch[BORDERS] = borders(batch["position_ids"])
    assert difference(together(model, batch), expected) < 2e-6
    apart = dict(batch) | {BORDERS: torch.tensor([0, batch["input_ids"].numel()], dtype=torch.int32)}
    assert difference(together(model, apart), expected) > 1e-2, "control: one segment for all"


@pytest.mark.parametrize("kind", KINDS)
def test_losses_per_example_and_gradients_are_those_of_single_examples(kind: str) -> None:
    model = windowless(kind).train()
    weight = model.model.layers[0].self_attn.q_proj.weight
    single, total = [], torch.zeros_like(weight)
    for example in examples():
        ids, labels = (torch.tensor(example[name])[None] for name in ("input_ids", "labels"))
        loss = model(input_ids=ids, labels=labels).loss
        single.append(loss.item())
        (grad,) = torch.autograd.grad(loss, weight)
        total += grad
    use_varlen_attention(model, CPU)
    batch = packed("sdpa")
    logits = model(**batch, **{BORDERS: borders(batch["position_ids"])}).logits
    rows = together_with_grad(logits)
    losses = [
        F.cross_entropy(row[:-1], torch.tensor(example["labels"])[1:])
        for row, example in zip(rows, examples(), strict=True)
    ]
    assert [loss.item() for loss in losses] == pytest.approx(single, rel=1e-6)
    (grad,) = torch.autograd.grad(sum(losses), weight)  # type: ignore[arg-type]
    torch.testing.assert_close(grad, total, rtol=1e-4, atol=1e-6)


def test_segments_and_logits_at_targets_go_together() -> None:
    model, batch = windowless("llama").train(), packed("sdpa")
    expected = model(**batch).loss.item()
    assert use_varlen_attention(model, CPU) and use_target_head(model)
    given = batch | {BORDERS: borders(batch["position_ids"]), INDEX: target_index(batch["labels"])}
    found = model(**given)
    assert found.logits is None and found.loss.item() == pytest.approx(expected, rel=1e-6)


def together_with_grad(logits: torch.Tensor) -> list[torch.Tensor]:
    found = {}
    for row, pack in enumerate(plan_packs(LENGTHS, ROOM)):
        start = 0
        for index in pack:
            found[index] = logits[row, start : start + LENGTHS[index]]
            start += LENGTHS[index]
    return [found[index] for index in range(len(LENGTHS))]


def test_borders_are_where_positions_restart_and_padding_is_one_segment() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 0, 0], [0, 0, 1, 0, 1, 2, 3, 4], [0, 0, 0, 0, 0, 0, 0, 0]])
    found = borders(positions)
    assert found.dtype == torch.int32 and len(found) % 32 == 0
    assert found[:7].tolist() == [0, 3, 5, 8, 9, 11, 16] and set(found[7:].tolist()) == {24}


def test_what_is_not_known_keeps_its_mask() -> None:
    window = tiny("mistral", "sdpa")
    assert group_of("mistral") is not None and not use_varlen_attention(window, CPU), "a sliding window"
    assert not use_varlen_attention(tiny("gpt_oss", "eager"), CPU)
    assert not use_varlen_attention(windowless("llama", "eager"), CPU)
    dropping = windowless("llama")
    dropping.config.attention_dropout = 0.1
    assert not use_varlen_attention(dropping, CPU)
    assert not use_varlen_attention(windowless("llama"), torch.device("cuda")), "no kernel for fp32"
    assert all(model.config._attn_implementation != NAME for model in (window, dropping))


def test_generation_and_padded_batches_are_as_before() -> None:
    model, ids = windowless("llama"), torch.randint(8, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        tokens = model.generate(ids[:1], max_new_tokens=4, do_sample=False, use_cache=True)
        use_varlen_attention(model, CPU)
        found = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(model.generate(ids[:1], max_new_tokens=4, do_sample=False, use_cache=True), tokens)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
