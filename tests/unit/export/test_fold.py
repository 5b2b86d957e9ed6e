"""Folding keeps the update, drops masked rows, and balances the factors."""

from __future__ import annotations

import pytest
import torch

from salient_ds.export.fold import AdapterFactors, delta_weight, fold

R, WIDE, TALL = 6, 20, 12


def make(mask: list[int], E: torch.Tensor | None, scaling: float = 1.5, dtype: torch.dtype = torch.float32):
    draw = torch.Generator().manual_seed(0)
    A_RI, B_OR = torch.randn(R, WIDE, generator=draw), torch.randn(TALL, R, generator=draw)
    return AdapterFactors("m", A_RI.to(dtype), E, B_OR.to(dtype), torch.tensor(mask, dtype=torch.bool), scaling)


def dense(f: AdapterFactors) -> torch.Tensor:
    """The update as the adapter computes it, in fp64."""
    E_R = torch.ones(R, dtype=torch.float64) if f.E is None else f.E.double()
    return f.scaling * f.B.double() @ torch.diag(E_R * f.mask) @ f.A.double()


@pytest.mark.parametrize("E", [torch.tensor([1e-6, -0.3, 2.0, -40.0, 0.7, 1.0]), None], ids=["svd", "plain"])
@pytest.mark.parametrize("mask", [[1, 1, 1, 1, 1, 1], [0, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0]])
def test_update_is_unchanged(mask: list[int], E: torch.Tensor | None) -> None:
    factors = make(mask, E)
    pair = fold(factors)
    assert pair is not None and pair.rank == sum(mask)
    assert pair.A_rI.shape == (sum(mask), WIDE) and pair.B_Or.shape == (TALL, sum(mask))
    expected = dense(factors)
    assert (delta_weight(pair).double() - expected).norm() / expected.norm() < 1e-6


def test_rank_zero_is_nothing() -> None:
    assert fold(make([0] * R, torch.ones(R))) is None


def test_live_rows_with_zero_E_stay() -> None:
    pair = fold(make([1, 1, 1, 0, 0, 0], torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])))
    assert pair is not None and pair.rank == 3
    assert pair.B_Or[:, :2].abs().max() == 0 and pair.A_rI[:2].abs().min() > 0


def test_A_is_exact_and_factors_are_balanced() -> None:
    gains = torch.tensor([1e-6, -1e-3, 0.1, 1.0, 30.0, 2000.0])
    factors = make([1] * R, gains, scaling=1.0)
    pair = fold(factors)
    assert pair is not None
    ratio_rI = pair.A_rI / factors.A
    assert torch.equal(ratio_rI, ratio_rI[:, :1].expand_as(ratio_rI))  # one factor per row ...
    assert torch.equal(torch.frexp(ratio_rI[:, 0]).mantissa, torch.full((R,), 0.5))  # ... a power of two
    rms_A_r, rms_B_r = pair.A_rI.square().mean(1).sqrt(), pair.B_Or.square().mean(0).sqrt()
    assert ((rms_A_r / rms_B_r).log2().abs() <= 1.001).all()


def test_small_singular_values_survive_fp16() -> None:
    """Balanced, a gain of 1e-7 keeps its update in fp16; all of it in B, most elements would be subnormal or zero."""
    factors = make([1, 0, 0, 0, 0, 0], torch.full((R,), 1e-7), scaling=1.0)
    pair, expected = fold(factors), dense(factors)
    assert pair is not None
    balanced = pair.B_Or.half().double() @ pair.A_rI.half().double()
    one_sided = (factors.B[:, :1] * 1e-7).half().double() @ factors.A[:1].half().double()
    assert (balanced - expected).norm() / expected.norm() < 1e-3
    assert (one_sided - expected).norm() / expected.norm() > 0.1


def test_bf16_factors_are_folded_in_fp32() -> None:
    factors = make([1] * R, torch.rand(R).to(torch.bfloat16) + 0.5, dtype=torch.bfloat16)
    pair, expected = fold(factors), dense(factors)
    assert pair is not None and pair.A_rI.dtype == pair.B_Or.dtype == torch.float32
    assert (delta_weight(pair).double() - expected).norm() / expected.norm() < 1e-6


def test_masked_rows_may_hold_anything_live_ones_not() -> None:
    values = torch.tensor([1.0, float("nan"), 1.0, 1.0, 1.0, 1.0])
    assert fold(make([1, 0, 1, 0, 0, 0], values)) is not None
    with pytest.raises(ValueError, match="'m' holds NaN"):
        fold(make([1, 1, 0, 0, 0, 0], values))


def test_misfitting_shapes_are_named() -> None:
    mask = torch.ones(R, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'m' do not fit.*A \(5, 20\)"):
        AdapterFactors("m", torch.zeros(5, WIDE), None, torch.zeros(TALL, R), mask, 1.0)
    with pytest.raises(ValueError, match=r"E \(6, 1\)"):
        AdapterFactors("m", torch.zeros(R, WIDE), torch.zeros(R, 1), torch.zeros(TALL, R), mask, 1.0)
    with pytest.raises(ValueError, match="expected torch.bool"):
        AdapterFactors("m", torch.zeros(R, WIDE), None, torch.zeros(TALL, R), mask.float(), 1.0)
