"""Packing and batches: plans, tensors, and a real LlamaForCausalLM that must not notice that examples were packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from salient_ds.data.collate import Collator, pad_token_id
from salient_ds.data.dataset import InstructionDataset
from salient_ds.data.packing import pack_examples, plan_packs

LENGTHS = (5, 9, 3, 12, 7, 4)


@pytest.fixture(scope="module")
def examples() -> InstructionDataset:
    rng = np.random.RandomState(1)
    made = []
    for length in LENGTHS:
        ids = rng.randint(3, 60, size=length)
        labels = ids.copy()
        labels[: length // 2] = -100
        made.append({"input_ids": ids, "labels": labels})
    return InstructionDataset(made)


def packed(examples: InstructionDataset, max_length: int = 16) -> InstructionDataset:
    return InstructionDataset(pack_examples(examples, examples.lengths, max_length))


def tiny_llama(attention: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    config._attn_implementation = attention
    return LlamaForCausalLM(config).eval()


def first_fit_decreasing(lengths: list[int], room: int) -> list[list[int]]:
    """The textbook loop."""
    packs: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda k: (-lengths[k], k)):
        for pack in packs:
            if sum(lengths[k] for k in pack) + lengths[index] <= room:
                pack.append(index)
                break
        else:
            packs.append([index])
    return [sorted(pack) for pack in packs]


def test_plan_is_first_fit_decreasing() -> None:
    rng = np.random.RandomState(0)
    for count in (0, 1, 2, 3, 64, 200):
        lengths = rng.randint(1, 33, size=count).tolist()
        assert plan_packs(lengths, 32) == first_fit_decreasing(lengths, 32)


def test_plan_errors() -> None:
    with pytest.raises(ValueError, match="example 1 has 20 tokens, a packed sequence holds 16"):
        plan_packs([5, 20], 16)


def test_packed_examples_keep_every_token_and_target(examples: InstructionDataset) -> None:
    whole = packed(examples)
    assert len(whole) < len(examples) and whole.columns == (
        "input_ids",
        "labels",
        "position_ids",
        "segment_ids",
    )
    assert whole.num_targets.sum() == examples.num_targets.sum()
    seen = []
    for sequence in whole:
        assert len(sequence["labels"]) <= 16
        for segment in range(sequence["segment_ids"].max() + 1):
            of_segment = sequence["segment_ids"] == segment
            assert sequence["position_ids"][of_segment].tolist() == list(range(of_segment.sum()))
            assert sequence["labels"][of_segment][0] == -100
            seen.append(sequence["input_ids"][of_segment].tobytes())
    assert sorted(seen) == sorted(example["input_ids"].tobytes() for example in examples)


def test_first_label_of_a_segment_is_never_predicted_from_the_one_before() -> None:
    two = InstructionDataset([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4], "labels": [3, 4]}])
    (sequence,) = packed(two)
    assert sequence["labels"].tolist() == [-100, 2, -100, 4]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_a_packed_batch_has_restarting_positions_and_no_mask(examples: InstructionDataset, attention: str) -> None:
    sequences = packed(examples)
    batch = Collator(7, attn_implementation=attention)(list(sequences))
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    one_row = attention == "flash_attention_2"
    for name, padding in (("input_ids", 7), ("labels", -100), ("position_ids", 0)):
        rows = [sequence[name].tolist() for sequence in sequences]
        rows = [sum(rows, [])] if one_row else rows
        assert batch[name].shape == (1, 40) if one_row else (3, 16)
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == [row + [padding] * (batch[name].shape[1] - len(row)) for row in rows]


def logits_by_example(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor], segments: torch.Tensor
) -> dict[bytes, Any]:
    """Logits of every segment of a packed batch, by its tokens."""
    with torch.no_grad():
        logits = model(**batch).logits
    found = {}
    for row, ids_of_row in enumerate(segments):
        for segment in ids_of_row.unique().tolist():
            here = ids_of_row == segment
            if segment >= 0:
                found[batch["input_ids"][row][here].numpy().tobytes()] = logits[row][here]
    return found


def segments_of(batch: dict[str, torch.Tensor], sequences: InstructionDataset) -> torch.Tensor:
    rows = torch.full(batch["input_ids"].shape, -1)
    if len(rows) == len(sequences):
        for row, sequence in zip(rows, sequences, strict=True):
            row[: len(sequence["labels"])] = torch.tensor(sequence["segment_ids"])
    else:
        offsets = np.cumsum([0, *(sequence["segment_ids"].max() + 1 for sequence in sequences)])
        joined = np.concatenate(
            [sequence["segment_ids"] + start for sequence, start in zip(sequences, offsets, strict=False)]
        )
        rows[0, : len(joined)] = torch.tensor(joined)
    return rows


def worst_difference(attention: str, form: str, examples: InstructionDataset, **changes: Any) -> float:
    """Largest difference between an example's logits alone and in a packed batch; `changes` replace batch
    entries."""
    model = tiny_llama(attention)
    model.config.use_cache = False  # with a cache, transformers does not look for segments in position_ids
    sequences = packed(examples)
    batch = Collator(0, 8, attn_implementation=form)(list(sequences))
    segments = segments_of(batch, sequences)
    batch |= {name: change(batch[name]) for name, change in changes.items()}
    found = logits_by_example(model, batch, segments)
    assert len(found) == len(examples)
    worst = 0.0
    for example in examples:
        ids = torch.tensor(example["input_ids"]).long()
        with torch.no_grad():
            alone = model(input_ids=ids[None]).logits[0]
        worst = max(worst, (found[ids.numpy().tobytes()] - alone).abs().max().item())
    return worst


@pytest.mark.parametrize(
    ("attention", "form"),
    [
        ("sdpa", "sdpa"),
        ("eager", "eager"),
        ("sdpa", "flash_attention_2"),
        ("eager", "flash_attention_2"),
    ],
)
def test_packed_logits_equal_those_alone(examples: InstructionDataset, attention: str, form: str) -> None:
    """The form for flash attention (one row, restarting positions, no mask) is honoured by the other two as
    well."""
    assert worst_difference(attention, form, examples) < 1e-5


@pytest.mark.parametrize("form", ["sdpa", "flash_attention_2"])
def test_control_without_restarting_positions_it_fails(examples: InstructionDataset, form: str) -> None:
    straight = {"position_ids": lambda ids: torch.arange(ids.shape[1]).expand_as(ids)}
    assert worst_difference("sdpa", form, examples, **straight) > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_control_with_a_mask_for_padding_or_with_a_cache_it_fails(examples: InstructionDataset, attention: str) -> None:
    """transformers looks for packed examples only without a mask and without a cache."""
    model, sequences = tiny_llama(attention), packed(examples)
    model.config.use_cache = False
    batch = Collator(0, attn_implementation=attention)(list(sequences))
    segments = segments_of(batch, sequences)
    right = logits_by_example(model, batch, segments)
    for wrong in ({"attention_mask": torch.ones_like(batch["input_ids"])}, {"use_cache": True}):
        found = logits_by_example(model, batch | wrong, segments)
        assert max(float((found[ids] - right[ids]).abs().max()) for ids in right) > 1e-2


@pytest.mark.parametrize("form", ["sdpa", "eager", "flash_attention_2"])
def test_packed_loss_and_gradient_equal_those_alone(examples: InstructionDataset, form: str) -> None:
    """Summed over targets: the loss of a packed batch is that of its examples."""
    model = tiny_llama("eager" if form == "eager" else "sdpa")
    model.config.use_cache = False
    batch = Collator(0, attn_implementation=form)(list(packed(examples)))
    total = int((batch["labels"] != -100).sum())
    loss = model(**batch).loss * total
    loss.backward()
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.grad is not None
    together, model_grad = loss.item(), weight.grad.clone()
    model.zero_grad()
    plain = Collator(0)(list(examples))
    alone = model(**plain).loss * int(examples.num_targets.sum())
    alone.backward()
    assert total == examples.num_targets.sum()
    assert together == pytest.approx(alone.item(), rel=1e-5)
    assert torch.allclose(model_grad, weight.grad, rtol=1e-4, atol=1e-4 * weight.grad.abs().max().item())


def test_padding_is_on_the_right_and_without_effect(examples: InstructionDataset) -> None:
    batch = Collator(pad_token_id=63)(list(examples))
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert all(tensor.shape == (6, 16) and tensor.dtype == torch.int64 for tensor in batch.values())
    for row, length in enumerate(LENGTHS):
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (16 - length)
        assert batch["input_ids"][row, length:].eq(63).all() and batch["labels"][row, length:].eq(-100).all()
        assert batch["input_ids"][row, :length].tolist() == examples[row]["input_ids"].tolist()
    model = tiny_llama("sdpa")
    with torch.no_grad():
        together = model(**batch)
        other_padding = model(**Collator(pad_token_id=5, pad_to_multiple_of=32)(list(examples)))
        alone = model(input_ids=batch["input_ids"][2:3, :3]).logits
    assert torch.allclose(together.logits[2:3, :3], alone, atol=1e-5)
    assert together.loss.item() == pytest.approx(other_padding.loss.item(), rel=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_padding_is_finite(examples: InstructionDataset, attention: str) -> None:
    batch = Collator(0, pad_to_multiple_of=64, attn_implementation=attention)(list(packed(examples)))
    assert batch["input_ids"].shape[1] == 64
    model = tiny_llama(attention)
    model.config.use_cache = False
    with torch.no_grad():
        assert torch.isfinite(model(**batch).logits).all()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_in_bf16(examples: InstructionDataset, attention: str) -> None:
    model = tiny_llama(attention)
    model.config.use_cache = False
    batch = Collator(0, attn_implementation=attention)(list(packed(examples)))
    with torch.no_grad():
        exact, rounded = model(**batch).logits, model.bfloat16()(**batch).logits.float()
    error = (exact - rounded).abs().mean() / exact.abs().mean()
    assert error < 0.05


def test_other_columns_are_padded_with_zero() -> None:
    batch = Collator(9, pad_to_multiple_of=1)(
        [
            {"input_ids": np.array([1, 2]), "token_type_ids": np.array([0, 1]), "labels": np.array([4])},
            {"input_ids": np.array([3]), "token_type_ids": np.array([1]), "labels": np.array([5])},
        ]
    )
    assert batch["input_ids"].tolist() == [[1, 2], [3, 9]] and batch["token_type_ids"].tolist() == [
        [0, 1],
        [1, 0],
    ]
    assert batch["labels"].tolist() == [[4], [5]] and batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_collator_errors() -> None:
    with pytest.raises(ValueError, match=r'attn_implementation="flex_attention": known are sdpa, eager'):
        Collator(0, attn_implementation="flex_attention")
    with pytest.raises(ValueError, match="pad_to_multiple_of=0"):
        Collator(0, 0)


def test_pad_token_id(llama: Any, chatml: Any) -> None:
    assert llama.pad_token_id is None and pad_token_id(llama) == llama.eos_token_id
    assert pad_token_id(chatml) == chatml.pad_token_id != chatml.eos_token_id
    chatml.pad_token = chatml.eos_token = None
    with pytest.raises(ValueError, match="neither pad_token nor eos_token"):
        pad_token_id(chatml)


def test_batches_of_one_shape_have_the_same_content(examples: InstructionDataset) -> None:
    for rows in (list(examples)[:2], list(examples)[2:], list(packed(examples))[:1]):
        usual, filled = Collator(7)(rows), Collator(7, fill_to=40)(rows)
        size = usual["input_ids"].shape[1]
        assert size < 40 and {column.shape for column in filled.values()} == {(len(rows), 40)}
        for name, column in filled.items():
            assert torch.equal(column[:, :size], usual[name])
            assert bool((column[:, size:] == {"input_ids": 7, "labels": -100}.get(name, 0)).all())


def test_longer_rows_are_not_cut_and_one_row_for_all_has_one_shape_too(examples: InstructionDataset) -> None:
    assert Collator(0, fill_to=8)(list(examples))["input_ids"].shape == (len(LENGTHS), 16)
    flat, rows = Collator(0, attn_implementation="flash_attention_2", fill_to=16), list(packed(examples))
    assert {flat(rows[i : i + 2])["input_ids"].shape for i in range(len(rows) - 1)} == {(1, 32)}
