"""The data set: storage, targets, fingerprint, split, and building it."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, Turn
from salient_ds.data.dataset import InstructionDataset, build_dataset, split_eval
from salient_ds.data.templates import get_template


def examples(count: int) -> list[dict[str, Any]]:
    rng = np.random.RandomState(0)
    made = []
    for k in range(count):
        ids = rng.randint(3, 100, size=rng.randint(2, 9))
        labels = ids.copy()
        labels[: k % len(ids)] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


def rows(count: int) -> list[Conversation]:
    return [
        Conversation(None, (Turn(USER, f"Question {k}?"), Turn(ASSISTANT, "a river " * (k % 5 + 1))))
        for k in range(count)
    ]


def same(left: InstructionDataset, right: InstructionDataset) -> bool:
    return left.fingerprint() == right.fingerprint()


def test_is_a_list_of_examples() -> None:
    made = examples(6)
    dataset = InstructionDataset(iter(made))
    assert len(dataset) == 6 and dataset.columns == ("input_ids", "labels")
    for example, original in zip(dataset, made, strict=True):
        for name in dataset.columns:
            assert example[name].dtype == np.int32 and np.array_equal(example[name], original[name])
    assert np.array_equal(dataset[-1]["labels"], made[5]["labels"])
    assert same(dataset[1:5:2], InstructionDataset([made[1], made[3]]))
    assert same(dataset.select([4, 0]), InstructionDataset([made[4], made[0]]))
    assert dataset.lengths.tolist() == [len(example["labels"]) for example in made]
    for index in (6, -7):
        with pytest.raises(IndexError):
            dataset[index]
    assert len(InstructionDataset([])) == 0


def test_other_columns_may_have_other_lengths() -> None:
    """As for an encoder-decoder, or one label per text."""
    dataset = InstructionDataset([{"input_ids": [1, 2, 3], "labels": [7]}, {"input_ids": [4], "labels": [8]}])
    assert dataset[0]["input_ids"].tolist() == [1, 2, 3] and dataset[1]["labels"].tolist() == [8]
    with pytest.raises(AssertionError, match="example 2 has the keys"):
        InstructionDataset([{"labels": [1]}, {"labels": [1], "input_ids": [1]}])
    with pytest.raises(TypeError):
        InstructionDataset([{"labels": [0.5]}])


def test_num_targets_counts_after_the_shift() -> None:
    dataset = InstructionDataset([{"labels": [5, 6, -100]}, {"labels": [-100, -100, 4]}, {"labels": [3]}])
    assert dataset.num_targets.dtype == np.int64 and dataset.num_targets.tolist() == [1, 1, 0]


def test_num_targets_is_what_a_causal_loss_averages_over() -> None:
    import torch

    logits = torch.zeros(1, 6, 10)
    for example in InstructionDataset(examples(12)):
        labels = torch.tensor(example["labels"] % 10 * (example["labels"] >= 0) - 100 * (example["labels"] < 0))
        losses = torch.nn.functional.cross_entropy(
            logits[0, :1].expand(len(labels) - 1, -1), labels[1:].long(), reduction="none"
        )
        assert InstructionDataset([example]).num_targets[0] == int((losses > 0).sum())


def test_fingerprint_is_of_content_and_order() -> None:
    made = examples(4)
    dataset = InstructionDataset(made)
    assert same(dataset, InstructionDataset(examples(4))) and len(dataset.fingerprint()) == 64
    assert same(pickle.loads(pickle.dumps(dataset)), dataset)
    others = [
        InstructionDataset(made[::-1]),
        InstructionDataset(made[:3]),
        InstructionDataset([{"input_ids": [1, 2], "labels": [1]}, {"input_ids": [3], "labels": [2, 3]}]),
        InstructionDataset([{"input_ids": [1], "labels": [1]}, {"input_ids": [2, 3], "labels": [2, 3]}]),
    ]
    changed = [dict(example) for example in made]
    changed[2]["labels"] = changed[2]["labels"].copy()
    changed[2]["labels"][-1] += 1
    others.append(InstructionDataset(changed))
    assert len({other.fingerprint() for other in (*others, dataset)}) == len(others) + 1


def test_split() -> None:
    dataset = InstructionDataset(examples(20))
    train, held_out = split_eval(dataset, 5, seed=3)
    assert (len(train), len(held_out)) == (15, 5)
    keys = [example["input_ids"].tobytes() for example in dataset]
    in_train, in_eval = ([keys.index(example["input_ids"].tobytes()) for example in part] for part in (train, held_out))
    assert sorted(in_train + in_eval) == list(range(20)) and in_train == sorted(in_train) and in_eval == sorted(in_eval)
    again = split_eval(dataset, 0.25, seed=3)
    assert same(again[0], train) and same(again[1], held_out), "a quarter is five of twenty"
    assert not same(split_eval(dataset, 5, seed=4)[1], held_out)
    assert in_eval == [2, 5, 9, 13, 14], "frozen: a resumed run must hold out the same examples"


@pytest.mark.parametrize("size", [0, 20, 25, 0.01, 0.99])
def test_split_needs_examples_on_both_sides(size: float) -> None:
    with pytest.raises(ValueError, match=r"of 20 examples: it must leave at least one.*give 1 to 19 examples"):
        split_eval(InstructionDataset(examples(20)), size, seed=0)
    with pytest.raises(ValueError, match="whole number"):
        split_eval(InstructionDataset(examples(20)), 2.5, seed=0)


def test_build(llama: Any) -> None:
    template = get_template("alpaca")
    dataset, report = build_dataset(rows(10), template, llama, 200)
    assert len(dataset) == report.kept == report.sequences == 10
    assert report.targets == dataset.num_targets.sum() and report.tokens == dataset.lengths.sum()
    assert same(build_dataset(iter(rows(10)), template, llama, 200, progress=True)[0], dataset)
    assert not same(build_dataset(rows(10), get_template("vicuna_v1.1"), llama, 200)[0], dataset)
    with pytest.raises(ValueError, match="no conversations"):
        build_dataset([], template, llama, 200)


def test_build_packed(llama: Any) -> None:
    template = get_template("alpaca")
    plain, _ = build_dataset(rows(10), template, llama, 300)
    packed, report = build_dataset(rows(10), template, llama, 300, True)
    assert len(packed) == report.sequences < report.kept == 10
    assert packed.num_targets.sum() == plain.num_targets.sum() == report.targets
    assert packed.lengths.sum() == plain.lengths.sum() and packed.lengths.max() <= 300
    assert f"packed into {len(packed)} sequences" in report.summary()
    assert same(build_dataset(rows(10), template, llama, 300, True)[0], packed)
