"""Smoothed sensitivity: the recursion, and row means of pieces that begin and end anywhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from salient_ds.ranks import Part
from salient_ds.salience import sensitivity
from salient_ds.salience.sensitivity import by_part, init, row_means, row_scores, update

SHAPES = [((3, 4), 0), ((3, 4), 1), ((5, 1), 0), ((1, 5), 0), ((1, 5), 1), ((6,), 0), ((4, 2), 1), ((2, 3), 0)]


def part_of(shape: tuple[int, ...], axis: int | None, lo: int, numel: int) -> Part:
    return Part("A", 0, lo, numel, shape, axis)


def random_steps(sizes: list[int], steps: int) -> list[tuple[list[Tensor], list[Tensor]]]:
    g = torch.Generator().manual_seed(0)
    return [tuple([torch.randn(n, generator=g) for n in sizes] for _ in range(2)) for _ in range(steps)]  # type: ignore[misc]


def plain(steps: list[tuple[list[Tensor], list[Tensor]]], index: int, b1: float, b2: float) -> tuple[Tensor, Tensor]:
    """The recursion as printed, in float64."""
    mean = deviation = torch.zeros_like(steps[0][0][index], dtype=torch.float64)
    for values, grads in steps:
        now = (values[index].double() * grads[index].double()).abs()
        mean = b1 * mean + (1 - b1) * now
        deviation = b2 * deviation + (1 - b2) * (now - mean).abs()
    return mean, deviation


@pytest.mark.parametrize("chunk", [1, 7, 2**24])
def test_update_is_the_printed_recursion(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity, "CHUNK", chunk)
    sizes = [5, 1, 9, 0, 3]
    steps = random_steps(sizes, 6)
    state = init(steps[0][0])
    for values, grads in steps:
        copies = [v.clone() for v in values + grads]
        assert update(state, values, grads, 0.8, 0.6) is state
        assert all(torch.equal(a, b) for a, b in zip(copies, values + grads, strict=True))
    for index in range(len(sizes)):
        mean, deviation = plain(steps, index, 0.8, 0.6)
        torch.testing.assert_close(state.sensitivity[index], mean.float())
        torch.testing.assert_close(state.uncertainty[index], deviation.float())
    assert state.nbytes == 2 * 4 * sum(sizes)


def test_neighbours_together_are_bitwise_what_they_are_alone() -> None:
    sizes, betas = [5, 1, 9, 3], (0.85, 0.9)
    steps = random_steps(sizes, 6)
    alone, together = init(steps[0][0]), init([torch.zeros(6), torch.zeros(12)])
    for values, grads in steps:
        update(alone, values, grads, *betas)
        update(together, *([torch.cat(t[:2]), torch.cat(t[2:])] for t in (values, grads)), *betas)
    spans = [[part_of((n,), 0, 0, n) for n in sizes[:2]], [part_of((n,), 0, 0, n) for n in sizes[2:]]]
    found = list(by_part(together, spans))
    assert [part.numel for part, _, _ in found] == sizes
    for (_, mean_n, spread_n), *expected in zip(found, alone.sensitivity, alone.uncertainty, strict=True):
        assert torch.equal(mean_n, expected[0]) and torch.equal(spread_n, expected[1])
    scores = [score for _, score in row_scores(together, spans)]
    singly = [score for _, score in row_scores(alone, [[part] for span in spans for part in span])]
    assert all(torch.equal(a, b) for a, b in zip(scores, singly, strict=True))


def test_nothing_observed_is_no_error() -> None:
    state = update(init([]), [], [], 0.85, 0.85)
    assert list(row_scores(state, [])) == []


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_row_means_of_every_possible_piece(shape: tuple[int, ...], axis: int) -> None:
    """Against a dense tensor that is zero outside the piece."""
    total = math.prod(shape)
    value_n = torch.randn(total, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for lo in range(total):
        for stop in range(lo, total + 1):
            dense = torch.zeros(total, dtype=torch.float64)
            dense[lo:stop] = value_n[lo:stop]
            expected_R = dense.view(shape).transpose(0, axis).reshape(shape[axis], -1).mean(1)
            found_R = row_means(part_of(shape, axis, lo, stop - lo), value_n[lo:stop])
            torch.testing.assert_close(found_R, expected_R, atol=1e-15, rtol=1e-14)


def test_row_means_are_summed_in_double_precision() -> None:
    value_n = torch.full((3 * 1000,), 0.1)
    value_n[::1000] = 1e7
    found_R = row_means(part_of((3, 1000), 0, 0, 3000), value_n)
    torch.testing.assert_close(found_R, value_n.double().view(3, 1000).mean(1), atol=0, rtol=1e-14)


class LargestInteger(TorchDispatchMode):
    """Records the size of the largest integer tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor) and not tensor.is_floating_point():
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("axis", [0, 1])
def test_no_index_of_the_size_of_the_elements(axis: int) -> None:
    with LargestInteger() as mode:
        row_means(part_of((40, 30), axis, 17, 1100), torch.ones(1100))
        assert mode.largest == 0
        torch.arange(1100)
        assert mode.largest == 1100  # the measurement sees what it should


def test_a_shared_factor_has_no_score() -> None:
    with pytest.raises(AssertionError, match="no score"):
        row_means(part_of((3, 4), None, 0, 12), torch.ones(12))
