"""The decomposition of B A from its factors against that of the dense product."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from salient_ds.salience.factored_svd import factored_singular_values, factored_svd, numerical_rank

SHAPES = [(4, 9, 7), (1, 5, 3), (7, 7, 7), (8, 5, 6), (8, 6, 5), (8, 3, 20), (8, 20, 3), (5, 1, 1)]
"""r, I, O: thin, square, and r above I, above O, above both."""


def draw(rank: int, wide: int, tall: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, wide, generator=generator), torch.randn(tall, rank, generator=generator)


def check(A_rI: Tensor, B_Or: Tensor, tolerance: float = 1e-13) -> None:
    """Every promise of the docstring. The tolerance is relative to the largest singular value."""
    U_Or, S_r, V_rI = factored_svd(A_rI, B_Or)
    dense_OI = B_Or.double() @ A_rI.double()
    rank, found = A_rI.shape[0], min(A_rI.shape[0], A_rI.shape[1], B_Or.shape[0])
    assert U_Or.shape == B_Or.shape and S_r.shape == (rank,) and V_rI.shape == A_rI.shape
    assert {U_Or.dtype, S_r.dtype, V_rI.dtype} == {torch.float64}
    size = float(torch.linalg.matrix_norm(dense_OI, 2)) or 1.0
    expected_r = torch.zeros(rank, dtype=torch.float64)
    expected_r[:found] = torch.linalg.svdvals(dense_OI)[:found]
    assert (S_r - expected_r).abs().max() <= tolerance * size
    assert (factored_singular_values(A_rI, B_Or) - S_r).abs().max() <= tolerance * size
    assert (S_r.diff() <= 0).all() and (S_r >= 0).all()
    assert ((U_Or * S_r) @ V_rI - dense_OI).abs().max() <= tolerance * size
    eye = torch.eye(found, dtype=torch.float64)
    assert (U_Or[:, :found].T @ U_Or[:, :found] - eye).abs().max() < 1e-12
    assert (V_rI[:found] @ V_rI[:found].T - eye).abs().max() < 1e-12
    assert not U_Or[:, found:].any() and not S_r[found:].any() and not V_rI[found:].any()


@pytest.mark.parametrize(("rank", "wide", "tall"), SHAPES)
def test_it_is_the_decomposition_of_the_dense_product(rank: int, wide: int, tall: int) -> None:
    check(*draw(rank, wide, tall))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.integers(0, 9))
def test_any_shape_and_any_rank_deficiency(rank: int, wide: int, tall: int, seed: int, copies: int) -> None:
    A_rI, B_Or = draw(rank, wide, tall, seed)
    for row in range(1, min(copies, rank)):
        A_rI[row] = A_rI[0]
    check(A_rI, B_Or)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_is_computed_in_float64(dtype: torch.dtype) -> None:
    A_rI, B_Or = draw(4, 9, 7)
    check(A_rI.to(dtype), B_Or.to(dtype))


def test_factors_of_zeros() -> None:
    A_rI, B_Or = draw(4, 9, 7)
    for pair in ((A_rI * 0, B_Or), (A_rI, B_Or * 0), (A_rI * 0, B_Or * 0)):
        check(*pair)
        assert not factored_svd(*pair)[1].any()


def test_rows_without_effect_give_zeros() -> None:
    A_rI, B_Or = draw(5, 9, 7)
    A_rI[1], B_Or[:, 3] = 0, 0
    check(A_rI, B_Or)
    assert (factored_singular_values(A_rI, B_Or)[3:] < 1e-15).all()


def test_badly_scaled_rows_cost_no_digits() -> None:
    """The same product, once with factors whose rows and columns have lengths from 1e-12 to 1e12."""
    A_rI, B_Or = (factor.double() for factor in draw(6, 9, 7))
    scale_r = torch.tensor([2.0**e for e in (-40, -20, 0, 10, 30, 40)], dtype=torch.float64)
    even, uneven = factored_singular_values(A_rI, B_Or), factored_singular_values(
        A_rI * scale_r.unsqueeze(1), B_Or / scale_r
    )  # fmt: skip
    assert ((even - uneven) / even).abs().max() < 1e-13


def test_the_product_is_never_formed() -> None:
    """The dense product would need 8 TB here."""
    A_rI, B_Or = draw(2, 1_000_000, 1_000_000)
    S_r = factored_singular_values(A_rI, B_Or)
    gram_rr = (B_Or.double().T @ B_Or.double()) @ (A_rI.double() @ A_rI.double().T)
    assert torch.allclose(S_r.square().sum(), gram_rr.trace(), rtol=1e-12)


def test_inputs_are_not_changed() -> None:
    A_rI, B_Or = draw(4, 9, 7)
    before = A_rI.clone(), B_Or.clone()
    factored_svd(A_rI, B_Or)
    factored_singular_values(A_rI.requires_grad_(), B_Or)
    assert torch.equal(A_rI, before[0]) and torch.equal(B_Or, before[1])


@pytest.mark.parametrize("function", [factored_svd, factored_singular_values])
def test_bad_input(function) -> None:
    A_rI, B_Or = draw(4, 9, 7)
    with pytest.raises(ValueError, match=r"A \(3, 9\) and B \(7, 4\) do not fit"):
        function(A_rI[:3], B_Or)
    with pytest.raises(ValueError, match="do not fit"):
        function(A_rI[0], B_Or)
    for bad in (float("nan"), float("inf")):
        spoiled = B_Or.clone()
        spoiled[0, 0] = bad
        with pytest.raises(ValueError, match=r"factor B \(7, 4\) holds NaN or infinity"):
            function(A_rI, spoiled)


def test_numerical_rank() -> None:
    A_rI, B_Or = draw(6, 9, 7)
    assert numerical_rank(factored_singular_values(A_rI, B_Or), 9, 7) == 6
    A_rI[4] = A_rI[0] - 2 * A_rI[1]
    A_rI[5] = 1e-6 * A_rI[5]
    assert numerical_rank(factored_singular_values(A_rI.double(), B_Or), 9, 7) == 6, "fp32 rounding of a row counts"
    A_rI = A_rI.double()
    A_rI[4] = A_rI[0] - 2 * A_rI[1]
    assert numerical_rank(factored_singular_values(A_rI, B_Or), 9, 7) == 5
    assert numerical_rank(factored_singular_values(A_rI * 0, B_Or), 9, 7) == 0
