"""Rotating many matrices: those on the host and those on the device come out alike, groups hold every matrix once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from salient_ds.adapters.inject import inject
from salient_ds.adapters.options import AdapterConfig
from salient_ds.engine import rotation
from salient_ds.engine.shards import Owned, owned_factors
from salient_ds.methods.lora.options import LoRAConfig

KINDS = ("master", "exp_avg", "exp_avg_sq")


def pairs() -> list[tuple[Owned, Owned]]:
    """The factors of three matrices of different sizes."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 9), torch.nn.Linear(9, 7))
    options = AdapterConfig(rank=3, target_modules="all-linear")
    owned = owned_factors(inject(model, options, LoRAConfig(), 0, torch.float32))
    return [(owned[i], owned[i + 1]) for i in range(0, len(owned), 2)]


def rotated(masks: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[Any]]:
    """All matrices with made-up values, after the rotation, and what it found."""
    draw = torch.Generator().manual_seed(0)
    sizes = [len(KINDS) * sum(owned.numel for owned in pair) for pair in pairs()]
    flats = [torch.rand(size, generator=draw) for size in sizes]
    found = list(rotation._rotate_all(list(zip(pairs(), flats, strict=True)), KINDS, masks))
    return flats, found


def test_small_and_large_matrices_come_out_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = [torch.tensor([True, False, True]), torch.ones(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)]
    small, found = rotated(masks)
    monkeypatch.setattr(rotation, "SMALL", 0)
    large, again = rotated(masks)
    for one, other in zip(small, large, strict=True):
        assert torch.equal(one, other)
    for (module, live_r, values_2r), (same, rows_r, other_2r) in zip(found, again, strict=True):
        assert module == same and torch.equal(live_r, rows_r) and torch.equal(values_2r, other_2r)
        assert values_2r.shape == (2, int(masks[module].sum()))


def test_a_pruned_row_keeps_its_values() -> None:
    masks = [torch.tensor([True, False, True])] + [torch.ones(3, dtype=torch.bool)] * 2
    (first, *_), _ = rotated(masks)
    before = torch.rand(len(first), generator=torch.Generator().manual_seed(0))
    A, _ = pairs()[0]
    rows_RI = first[: A.numel].view(A.address.shape), before[: A.numel].view(A.address.shape)
    assert torch.equal(rows_RI[0][1], rows_RI[1][1]) and not torch.equal(rows_RI[0][0], rows_RI[1][0])


@pytest.mark.parametrize(("limit", "expected"), [(1, [1, 1, 1]), (200, [1, 1, 1]), (300, [2, 1]), (10**6, [3])])
def test_groups_hold_every_matrix_once(monkeypatch: pytest.MonkeyPatch, limit: int, expected: list[int]) -> None:
    monkeypatch.setattr(rotation, "GROUP", limit)
    groups = list(rotation._groups(pairs(), len(KINDS), 1))
    assert [len(group) for group in groups] == expected
    assert [index for group in groups for index, _ in group] == [0, 1, 2]
