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


def second_moments(before: Factors, grads_TOI: Tensor) -> tuple[Tensor, Tensor, Factors]:
    """What the second moments of A and B should be after the rotation, and the rotated factors with what they are.

    ``grads_TOI``: gradients of a loss by the product, whose squares the moments are the mean of.
    """
    of_A, of_B = before.B_Or.T @ grads_TOI, grads_TOI @ before.A_rI.T
    moments = {"A": {"exp_avg_sq": of_A.square().mean(0)}, "B": {"exp_avg_sq": of_B.square().mean(0)}}
    found = rotate(Factors(before.A_rI, before.B_Or, moments["A"], moments["B"]))
    after_A, after_B = found.factors.B_Or.T @ grads_TOI, grads_TOI @ found.factors.A_rI.T
    return after_A.square().mean(0), after_B.square().mean(0), found.factors


def test_second_moments_of_gradients_that_are_the_same_in_all_directions() -> None:
    """They are right for the strongest row, even if all columns of B point in nearly one direction."""
    draw = torch.Generator().manual_seed(2)
    B_Or = torch.randn(6, 1, generator=draw) + 0.1 * torch.randn(6, 3, generator=draw)
    A_rI = torch.randn(1, 5, generator=draw) + 0.1 * torch.randn(3, 5, generator=draw)
    true_A, true_B, found = second_moments(Factors(A_rI, B_Or, {}, {}), torch.randn(20000, 6, 5, generator=draw))
    torch.testing.assert_close(found.moments_A["exp_avg_sq"][0], true_A[0], rtol=0.1, atol=0.0)
    torch.testing.assert_close(found.moments_B["exp_avg_sq"][:, 0], true_B[:, 0], rtol=0.1, atol=0.0)


@pytest.mark.parametrize("rank", [1, 2, 6])
def test_second_moments_are_not_too_small_for_rows_that_stay(rank: int) -> None:
    """Else Adam's next steps would be too long. Gradients of a few directions, factors that learned from them."""
    draw = torch.Generator().manual_seed(rank)
    left, right = torch.randn(6, rank, generator=draw), torch.randn(rank, 5, generator=draw)
    grads_TOI = (left * torch.randn(5000, 1, rank, generator=draw)) @ right
    mix = torch.randn(rank, 3, generator=draw)
    before = Factors(mix.T @ right + 0.1 * torch.randn(3, 5, generator=draw), left @ mix, {}, {})
    true_A, true_B, found = second_moments(before, grads_TOI)
    assert bool((found.moments_A["exp_avg_sq"][0] > 0.6 * true_A[0]).all())
    assert bool((found.moments_B["exp_avg_sq"][:, 0] > 0.6 * true_B[:, 0]).all())


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
