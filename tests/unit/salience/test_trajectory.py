"""The window: copies, sharding, and re-sharding in the middle."""

from __future__ import annotations

import pytest
import torch

from salient_ds.salience.trajectory import Trajectory

CPU = torch.device("cpu")


def test_shards_add_up_to_the_window() -> None:
    values_TN = torch.randn(5, 9)
    shards = [torch.tensor([0, 1, 2]), torch.tensor([8, 3]), torch.tensor([4, 5, 6, 7])]
    whole_NT = torch.zeros(9, 5)
    for rows_n in shards:
        track = Trajectory()
        for values_N in values_TN:
            track.append("v", rows_n, values_N[rows_n], 5)
        part_NT = track.assemble(9, 5, CPU)
        assert part_NT.abs().sum(1).nonzero().flatten().tolist() == sorted(rows_n.tolist())
        whole_NT += part_NT
    assert torch.equal(whole_NT, values_TN.T)


def test_values_are_copied_and_kept_in_float32() -> None:
    track = Trajectory()
    live_n, rows_n = torch.ones(3, dtype=torch.bfloat16), torch.arange(3)
    track.append("v", rows_n, live_n, 1)
    live_n.zero_()
    rows_n.zero_()
    assert track.assemble(3, 1, CPU).flatten().tolist() == [1, 1, 1]
    assert track.assemble(3, 1, CPU).dtype == torch.float32


def test_views_are_independent_and_a_view_without_rows_is_nothing() -> None:
    track = Trajectory()
    track.append("empty", torch.zeros(0, dtype=torch.int64), torch.zeros(0), 2)
    assert track.nbytes == 0
    for step in (1.0, 2.0):
        track.append("a", torch.tensor([1]), torch.tensor([step]), 2)
        track.append("b", torch.tensor([0]), torch.tensor([-step]), 2)
    assert track.assemble(3, 2, CPU).tolist() == [[-1, -2], [1, 2], [0, 0]]


def test_history_and_restore_with_other_shards() -> None:
    values_TN = torch.randn(6, 8)
    before = {"x": torch.tensor([5, 0, 1, 2]), "y": torch.tensor([3, 4, 7, 6])}
    old = Trajectory()
    for values_N in values_TN[:4]:
        for key, rows_n in before.items():
            old.append(key, rows_n, values_N[rows_n], 6)
    saved_tN = torch.full((4, 8), torch.nan)
    for key, rows_n in before.items():
        part = rows_n[1:3]
        assert torch.equal(old.history(key, part), values_TN[:4][:, part])  # type: ignore[arg-type]
        saved_tN[:, rows_n] = old.history(key, rows_n)  # type: ignore[assignment]
    new = Trajectory()
    after = {"z": torch.arange(8)}
    new.restore("z", after["z"], saved_tN, 6)
    for values_N in values_TN[4:]:
        new.append("z", after["z"], values_N, 6)
    assert torch.equal(new.assemble(8, 6, CPU), values_TN.T)


def test_nothing_recorded_and_freed() -> None:
    track = Trajectory()
    assert track.history("v", torch.arange(2)) is None
    track.append("v", torch.arange(2), torch.ones(2), 200)
    assert track.nbytes == 2 * 200 * 4
    track.clear()
    assert track.nbytes == 0
    assert track.history("v", torch.arange(2)) is None


def test_broken_promises_are_noticed() -> None:
    track = Trajectory()
    track.append("v", torch.arange(2), torch.ones(2), 2)
    with pytest.raises(AssertionError, match="1 of 2 steps"):
        track.assemble(4, 2, CPU)
    with pytest.raises(AssertionError, match="does not own"):
        track.history("v", torch.tensor([0, 3]))
    track.append("v", torch.arange(2), torch.ones(2), 2)
    with pytest.raises(AssertionError, match="more than 2 times"):
        track.append("v", torch.arange(2), torch.ones(2), 2)
