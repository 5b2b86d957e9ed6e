"""Several data sets with weights: how often each row comes, what is held out, what a fingerprint tells apart."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from salient_ds.config.data import DataConfig
from salient_ds.data.dataset import InstructionDataset
from salient_ds.data.mixture import Mixture
from salient_ds.data.sampler import StepSampler, epoch_rows
from salient_ds.data.shares import Share, held_out_counts, share_of


def rows(count: int, first: int = 0) -> InstructionDataset:
    return InstructionDataset(
        {"input_ids": [first + k, 1, 2][: 2 + k % 2], "labels": [-100, 1, 2][: 2 + k % 2]} for k in range(count)
    )


def sampler_of(shares: list[Share], batch: int = 4, seed: int = 3) -> StepSampler:
    return StepSampler(sum(share.per_epoch for share in shares), batch, seed, shares)


@pytest.mark.parametrize(
    ("count", "weight", "per_epoch"), [(10, 1, 10), (10, 2, 20), (10, 0.5, 5), (10, 0.25, 3), (3, 0.01, 1), (7, 1.1, 8)]
)
def test_a_weight_is_how_often_an_epoch_takes_a_row(count: int, weight: float, per_epoch: int) -> None:
    assert share_of(count, weight) == Share(count, per_epoch)


def test_rows_come_as_often_as_their_weight_says() -> None:
    shares = [share_of(10, 2), share_of(8, 0.5), share_of(6, 1.5), share_of(5, 1)]
    sampler = sampler_of(shares, batch=1)
    epoch = sampler.num_examples
    assert epoch == 20 + 4 + 9 + 5
    stream = [int(sampler.indices(step)[0]) for step in range(2 * epoch)]
    for k in range(2):
        seen = Counter(stream[k * epoch : (k + 1) * epoch])
        assert all(seen[row] == 2 for row in range(10)) and all(seen[row] == 1 for row in range(24, 29))
        assert sum(seen[row] for row in range(10, 18)) == 4 and {seen[row] for row in range(18, 24)} == {1, 2}
    both = Counter(stream)
    assert all(both[row] == 1 for row in range(10, 18)), "the second epoch takes the other half"
    assert all(both[row] == 3 for row in range(18, 24))


def test_a_step_alone_is_the_step_of_the_run_and_equal_weights_are_one_data_set() -> None:
    shares = [share_of(9, 0.4), share_of(5, 3)]
    run = sampler_of(shares)
    in_order = [run.indices(step).tolist() for step in range(30)]
    assert [sampler_of(shares).indices(step).tolist() for step in (29, 3, 11)] == [in_order[k] for k in (29, 3, 11)]
    assert in_order != [sampler_of(shares, seed=4).indices(step).tolist() for step in range(30)]
    plain, equal = StepSampler(14, 4, 3), sampler_of([share_of(9, 1), share_of(5, 1)])
    assert [plain.indices(k).tolist() for k in range(9)] == [equal.indices(k).tolist() for k in range(9)]


def test_the_stream_of_a_weighted_set_is_frozen() -> None:
    """A checkpoint is resumed with whatever numpy is installed then."""
    assert epoch_rows([Share(6, 2), Share(2, 5)], 7, 1).tolist() == [0, 4, 6, 7, 6, 7, 7]


def test_a_mixture_is_its_sets_one_after_the_other() -> None:
    a, b = rows(5), rows(4, first=50)
    mixed = Mixture([a, rows(0), b])
    assert len(mixed) == 9 and [int(row["input_ids"][0]) for row in mixed] == [0, 1, 2, 3, 4, 50, 51, 52, 53]
    assert mixed.num_targets.tolist() == [*a.num_targets.tolist(), *b.num_targets.tolist()]
    assert int(mixed[-1]["input_ids"][0]) == 53 and len(mixed[3:7]) == 4
    with pytest.raises(IndexError):
        mixed[9]


def test_a_fingerprint_tells_sets_their_order_and_weights_apart() -> None:
    a, b = rows(5), rows(4, first=50)
    found = [
        Mixture([a, b]),
        Mixture([b, a]),
        Mixture([a, b], [share_of(5, 2), share_of(4, 1)]),
        Mixture([a, b], [share_of(5, 1), share_of(4, 2)]),
        Mixture([a, rows(4, first=51)]),
    ]
    assert len({one.fingerprint() for one in found}) == 5
    assert Mixture([a, b]).fingerprint() == found[0].fingerprint()


@pytest.mark.parametrize(
    ("sizes", "size", "counts"),
    [([100, 50], 0.1, [10, 5]), ([100, 50], 15, [10, 5]), ([100, 1], 0.5, [50, 0]), ([3, 2], 3, [2, 1]),
     ([10, 10, 10], 4, [2, 1, 1]), ([1, 1, 9], 8, [0, 0, 8])],
)  # fmt: skip
def test_rows_are_held_out_of_every_set(sizes: list[int], size: float, counts: list[int]) -> None:
    assert held_out_counts(sizes, size) == counts


@pytest.mark.parametrize(
    ("sizes", "size", "said"),
    [([3, 2], 4, "the 3 rows"), ([3, 2], 0.1, "no row of any"), ([9, 9], 2.5, "whole number")],
)
def test_a_split_that_cannot_be_is_refused(sizes: list[int], size: float, said: str) -> None:
    with pytest.raises(ValueError, match=f"data.eval_size={size:g}.*{said}"):
        held_out_counts(sizes, size)


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "two", None, 1001])
def test_a_weight_that_means_nothing_is_refused_in_one_sentence(weight: Any) -> None:
    with pytest.raises(ValueError, match=r"data.train, element 2: weight=.*above 0, at most 1000"):
        DataConfig.model_validate({"train": ["a.jsonl", {"path": "b.jsonl", "weight": weight}]})


@pytest.mark.parametrize(
    ("train", "said"),
    [([], "at least one"), (5, "give a file"), ([3], "element 1: 3 is neither"), ([{"weight": 2}], "'path' is missing"),
     ([{"path": "a", "wieght": 2}], "did you mean 'weight'"), (["a", {"path": "a", "weight": 2}], "2 times"),
     ([{"path": "a", "format": "alpacca"}], "format='alpacca'")],
)  # fmt: skip
def test_a_list_that_means_nothing_is_refused(train: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataConfig.model_validate({"train": train})


def test_a_path_alone_has_weight_one() -> None:
    data = DataConfig.model_validate({"train": [{"path": "a.jsonl", "weight": 2}, "b.parquet"]})
    assert [(one.path, one.weight) for one in data.sets] == [("a.jsonl", 2), ("b.parquet", 1)]
    assert [one.path for one in DataConfig(train="a.jsonl").sets] == ["a.jsonl"]
    assert DataConfig.model_validate(data.model_dump(mode="json")) == data
