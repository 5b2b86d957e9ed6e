"""The sampler: every example once per epoch, the same for any number of processes, from any step."""

from __future__ import annotations

import numpy as np
import pytest

from salient_ds.data.sampler import StepSampler


def test_stream_is_one_permutation_after_the_other() -> None:
    sampler = StepSampler(num_examples=10, global_batch_size=4, seed=1)
    stream = np.concatenate([sampler.indices(step) for step in range(10)])
    for epoch in range(4):
        assert sorted(stream[10 * epoch : 10 * (epoch + 1)]) == list(range(10))
    assert not np.array_equal(stream[:10], stream[10:20]), "epochs are shuffled differently"
    assert stream.dtype == np.int64


def test_any_step_alone_is_the_step_of_the_run() -> None:
    run = StepSampler(23, 8, seed=5)
    in_order = [run.indices(step) for step in range(40)]
    for step in (39, 0, 17, 3):
        assert np.array_equal(StepSampler(23, 8, seed=5).indices(step), in_order[step])
        assert np.array_equal(run.indices(step), in_order[step]), "no state is left behind"
    assert any(not np.array_equal(StepSampler(23, 8, seed=6).indices(step), in_order[step]) for step in range(3))


def test_streams_are_frozen() -> None:
    """A checkpoint is resumed with whatever numpy is installed then."""
    assert StepSampler(10, 10, seed=7).indices(0).tolist() == [4, 5, 9, 8, 1, 7, 6, 0, 2, 3]
    assert StepSampler(10, 5, seed=7).indices(3).tolist() == [7, 3, 4, 1, 2]


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_do_not_depend_on_the_number_of_processes(micro: int) -> None:
    sampler = StepSampler(50, 24, seed=0)
    for step in (0, 4, 9):
        seen = []
        for world in (1, 2, 4):
            shards = [sampler.shard(step, rank, world, micro) for rank in range(world)]
            assert all(len(shard) == 24 // world // micro for shard in shards)
            assert all(batch.shape == (micro,) for shard in shards for batch in shard)
            seen.append(sorted(tuple(batch.tolist()) for shard in shards for batch in shard))
        assert seen[0] == seen[1] == seen[2]
        assert sorted(sum(seen[0], ())) == sorted(sampler.indices(step).tolist())


def test_shards_keep_the_order_of_the_batch() -> None:
    sampler = StepSampler(50, 8, seed=0)
    batch = sampler.indices(2)
    first, second = (sampler.shard(2, rank, 2, 2) for rank in range(2))
    assert np.array_equal(np.concatenate([first[0], second[0], first[1], second[1]]), batch)
    assert np.array_equal(np.concatenate(sampler.shard(2, 0, 1, 2)), batch)


def test_batch_larger_than_the_data() -> None:
    sampler = StepSampler(3, 8, seed=0)
    counts = np.bincount(np.concatenate([sampler.indices(step) for step in range(3)]), minlength=3)
    assert counts.tolist() == [8, 8, 8]


def test_steps_and_epochs() -> None:
    sampler = StepSampler(10, 4, seed=0)
    assert sampler.steps_per_epoch == 3 and sampler.total_steps(2) == 5 and sampler.total_steps(0.5) == 2
    assert sampler.epoch(0) == 0 and sampler.epoch(5) == 2.0
    assert StepSampler(52002, 128, seed=0).total_steps(3) == 1219
    assert StepSampler(10, 11, seed=0).total_steps(1.1) == 1, "1.1 x 10 is eleven, whatever floating point says"
    with pytest.raises(ValueError, match="epochs=0"):
        sampler.total_steps(0)


def test_errors() -> None:
    with pytest.raises(
        ValueError,
        match=r"global_batch_size=12 is not divisible by micro_batch_size=4 x 2 processes = 8: "
        r"set it to 8 or 16",
    ):
        StepSampler(50, 12, seed=0).shard(0, 0, 2, 4)
    with pytest.raises(ValueError, match="set it to 8, or change"):
        StepSampler(50, 4, seed=0).shard(0, 0, 2, 4)
    with pytest.raises(ValueError, match="num_examples=0: must be at least 1"):
        StepSampler(0, 4, seed=0)
    with pytest.raises(ValueError, match="global_batch_size=0"):
        StepSampler(5, 0, seed=0)
    with pytest.raises(ValueError, match="seed=-1"):
        StepSampler(5, 1, seed=-1)
    with pytest.raises(ValueError, match="step=-1"):
        StepSampler(5, 1, seed=0).indices(-1)
    for rank, world, micro in ((2, 2, 1), (-1, 2, 1), (0, 0, 1), (0, 1, 0)):
        with pytest.raises(ValueError, match="global_rank"):
            StepSampler(8, 4, seed=0).shard(0, rank, world, micro)
