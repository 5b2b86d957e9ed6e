"""One flat optimizer that treats modules as if each had its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from salient_ds.heterolora.module_rates import MOMENTS, ModuleRates
from salient_ds.ranks import AdamSettings, Part

SIZES = (7, 5, 6)
ADAM: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}


class FlatView:
    """Three modules, one factor each, in one buffer of one optimizer."""

    key = "flat"

    def __init__(self, start: Tensor, decoupled: bool) -> None:
        self.parts = tuple(Part("B" if k == 2 else "A", k, 0, n, (n,), None) for k, n in enumerate(SIZES))
        self.buffer = start.clone().requires_grad_()
        kind = torch.optim.AdamW if decoupled else torch.optim.Adam
        self.optimizer = kind([self.buffer], **ADAM)
        self.decoupled = decoupled

    def _slice(self, tensor: Tensor, part: Part) -> Tensor:
        return tensor.split(SIZES)[part.module]

    def value(self, part: Part) -> Tensor:
        return self._slice(self.buffer.data, part)

    def moments(self, part: Part) -> dict[str, Tensor]:
        state = self.optimizer.state.get(self.buffer, {})
        return {name: self._slice(state[name], part) for name in MOMENTS if name in state}

    def settings(self, part: Part) -> AdamSettings:
        return AdamSettings(**ADAM, decoupled=self.decoupled)


def gradient(step: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(step)
    return [torch.randn(n, generator=draw, dtype=torch.float64) for n in SIZES]


SWITCHES = {1: [True, False, True], 3: [True, True, False], 5: [True, True, True], 6: [True, False, False],
            9: [True, True, True]}  # fmt: skip


@pytest.mark.parametrize("decoupled", [True, False])
def test_equal_to_one_group_per_module(decoupled: bool) -> None:
    start = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    view, rates = FlatView(start, decoupled), ModuleRates(3)
    alone = [piece.clone().requires_grad_() for piece in start.split(SIZES)]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    reference = kind([{"params": [p]} for p in alone], **ADAM)
    on = [True] * 3
    for step in range(1, 13):
        if step in SWITCHES:
            on = SWITCHES[step]
            rates.switch(on, reset=False)
        grads = gradient(step)
        view.buffer.grad = torch.cat([g if is_on else torch.zeros_like(g) for g, is_on in zip(grads, on, strict=True)])
        for parameter, grad, is_on in zip(alone, grads, on, strict=True):
            parameter.grad = grad if is_on else None
        rates.keep(view, step)
        view.optimizer.step()
        rates.settle(view)
        rates.end_step()
        reference.step()
        for part, parameter in zip(view.parts, alone, strict=True):
            torch.testing.assert_close(view.value(part), parameter.detach(), rtol=1e-12, atol=1e-14)
            for name, value in view.moments(part).items():
                expected = reference.state[parameter].get(name, torch.zeros_like(value))
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
    assert rates.steps_M == [12, 7, 7] == [int(reference.state[p]["step"]) for p in alone]


def test_a_module_that_was_never_off_is_left_alone() -> None:
    start = torch.ones(sum(SIZES), dtype=torch.float64)
    view, plain, rates = FlatView(start, True), FlatView(start, True), ModuleRates(3)
    rates.switch([True, False, True], reset=False)
    for step in (1, 2):
        for each in (view, plain):
            each.buffer.grad = torch.cat(gradient(step))
        rates.keep(view, step)
        for each in (view, plain):
            each.optimizer.step()
        rates.settle(view)
        rates.end_step()
    assert torch.equal(view.value(view.parts[0]), plain.value(plain.parts[0]))
    assert torch.equal(view.value(view.parts[1]), start.split(SIZES)[1])
    assert not torch.equal(plain.value(plain.parts[1]), start.split(SIZES)[1])


def test_reset_starts_over_from_b_equal_zero() -> None:
    start = torch.ones(sum(SIZES), dtype=torch.float64)
    view, rates = FlatView(start, True), ModuleRates(3)

    def step(number: int) -> None:
        view.buffer.grad = torch.cat(gradient(number))
        rates.keep(view, number)
        view.optimizer.step()
        rates.settle(view)
        rates.end_step()

    step(1)
    kept = view.value(view.parts[1]).clone()
    rates.switch([True, False, False], reset=True)
    step(2)
    factor_a, factor_b = view.parts[1], view.parts[2]
    assert torch.equal(view.value(factor_a), kept)  # A stays
    assert not view.value(factor_b).any()
    assert not any(m.any() for part in (factor_a, factor_b) for m in view.moments(part).values())
    assert rates.steps_M == [2, 0, 0]
    rates.switch([True, True, True], reset=True)
    step(3)
    assert view.value(factor_b).all() and rates.steps_M == [3, 1, 1]
