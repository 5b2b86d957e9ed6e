"""Rotation into the singular basis: the product stays, rows are ordered, moments follow."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from salient_ds.salience.rotation import Factors, Rotated, rotate


def factors(r: int, wide: int, tall: int, seed: int = 0, dead: int = 0) -> Factors:
    """Random factors with moments; the last ``dead`` columns of B are zero, as in rows that never learned."""
    draw = torch.Generator().manual_seed(seed)
    A_rI, B_Or = torch.randn(r, wide, generator=draw), torch.randn(tall, r, generator=draw)
    if dead:
        B_Or[:, -dead:] = 0
    gradients = {"A": torch.randn(r, wide, generator=draw), "B": torch.randn(tall, r, generator=draw)}
    moments = {name: {"exp_avg": g, "exp_avg_sq": g.square()} for name, g in gradients.items()}
    return Factors(A_rI, B_Or, moments["A"], moments["B"])


@settings(deadline=None, max_examples=40)
@given(r=st.integers(1, 6), wide=st.integers(6, 9), tall=st.integers(6, 9), seed=st.integers(0, 99), dead=st.booleans())
def test_the_product_stays_and_rows_are_its_singular_directions(
    r: int, wide: int, tall: int, seed: int, dead: bool
) -> None:
    before = factors(r, wide, tall, seed, dead=min(r - 1, 2) if dead else 0)
    found = rotate(before)
    after = found.factors
    torch.testing.assert_close(after.B_Or @ after.A_rI, before.B_Or @ before.A_rI, atol=1e-4, rtol=1e-4)
    expected_r = torch.linalg.svdvals((before.B_Or @ before.A_rI).double())[:r]
    torch.testing.assert_close(found.sigma_r, expected_r, atol=1e-4, rtol=1e-4)
    length = before.A_rI.square().sum(1).mean()
    torch.testing.assert_close(after.A_rI @ after.A_rI.T, torch.eye(r) * length, atol=1e-4, rtol=1e-4)
    overlap_rr = after.B_Or.T @ after.B_Or
    torch.testing.assert_close(overlap_rr, torch.diag(overlap_rr.diag()), atol=1e-4, rtol=1e-4)


def gradient_after(before: Factors, found: Rotated, grad_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the rotated factors of a loss whose gradient by the product is ``grad_OI``."""
    return found.factors.B_Or.T @ grad_OI, grad_OI @ found.factors.A_rI.T


def test_first_moments_become_the_gradients_of_the_rotated_factors() -> None:
    """If the first moment is the gradient itself, the rotated one is the gradient in the new basis."""
    before, grad_OI = factors(3, 7, 8), torch.randn(8, 7, generator=torch.Generator().manual_seed(1))
    of_A, of_B = before.B_Or.T @ grad_OI, grad_OI @ before.A_rI.T
    before = Factors(before.A_rI, before.B_Or, {"exp_avg": of_A}, {"exp_avg": of_B})
    found = rotate(before)
    expected_A, expected_B = gradient_after(before, found, grad_OI)
    torch.testing.assert_close(found.factors.moments_A["exp_avg"], expected_A, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.factors.moments_B["exp_avg"], expected_B, atol=1e-4, rtol=1e-4)


def test_second_moments_follow_for_uncorrelated_rows() -> None:
    """Means of squares over many gradients with independent rows, before and after."""
    before, draw = factors(3, 5, 6), torch.Generator().manual_seed(2)
    noise_Tr = torch.randn(20000, 3, 1, generator=draw) * torch.tensor([1.0, 2.0, 0.3])[:, None]
    noise_TrI = noise_Tr * torch.randn(20000, 1, 5, generator=draw).sign()
    squares_rI = noise_TrI.square().mean(0)
    before = Factors(before.A_rI, before.B_Or, {"exp_avg_sq": squares_rI}, {})
    found = rotate(before)
    inverse_rr = torch.linalg.lstsq(found.factors.A_rI.T, before.A_rI.T).solution.T
    expected_rI = (inverse_rr.T @ noise_TrI).square().mean(0)
    torch.testing.assert_close(found.factors.moments_A["exp_avg_sq"], expected_rI, rtol=0.05, atol=0.0)
    assert bool((found.factors.moments_A["exp_avg_sq"] >= 0).all())


def test_curvature_is_the_weighted_energy() -> None:
    """With second moments of one everywhere, it is the squared length of B's columns times the mixed second moment."""
    before = factors(3, 7, 8)
    found = rotate(before)
    moment_Or = found.factors.moments_B["exp_avg_sq"].double()
    expected_r = (found.factors.B_Or.double().square() * moment_Or).sum(0)
    torch.testing.assert_close(found.curvature_r, expected_r, rtol=1e-5, atol=0.0)
    without = rotate(Factors(before.A_rI, before.B_Or, {}, {}))
    assert not without.curvature_r.any() and torch.equal(without.sigma_r, found.sigma_r)


def test_factors_that_have_learned_nothing() -> None:
    A_rI = torch.randn(3, 5, generator=torch.Generator().manual_seed(3))
    for zero_A in (False, True):
        found = rotate(Factors(A_rI * (not zero_A), torch.zeros(4, 3), {}, {}))
        assert not found.sigma_r.any() and not found.factors.B_Or.any()
        assert bool(found.factors.A_rI.isfinite().all())


def test_a_factor_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        rotate(Factors(torch.full((2, 3), torch.nan), torch.ones(4, 2), {}, {}))
