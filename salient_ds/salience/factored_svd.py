"""The singular value decomposition of a product B A from its factors, without the product.

Shape legend: r = rows of A and columns of B, I = in features, O = out features, k = min(r, O), l = min(r, I).

The product has O x I elements, but a rank of at most r. With B = Q_B R_B and A^T = Q_A R_A, the product is
Q_B (R_B R_A^T) Q_A^T. The core R_B R_A^T has at most r x r elements, and its singular values are those of B A. For a
matrix of LLaMA-70B (O = 8192, I = 28672, r = 64) the core is 57,000 times smaller than the product.

QR keeps the scale of every column to itself. So a row of A of size 1e-8 beside a column of B of size 1e8 costs no
digits: their scales meet in one term of the core and cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor


def factored_svd(A_rI: Tensor, B_Or: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U, S and V with B A = U diag(S) V, in float64 on the factors' device.

    The result always has r singular values, also if r > min(I, O). At most min(r, I, O) of them are not zero. Columns
    of U and rows of V are orthonormal, but for those beyond min(r, I, O), which are zero like their singular values.
    Signs are those that LAPACK (or the device's library) chose.

    Returns:
        U_Or (O, r), S_r (r,) in descending order, V_rI (r, I).

    Raises:
        ValueError: shapes do not fit together, or a factor holds NaN or infinity.
    """
    A_rI, B_Or = _checked(A_rI, B_Or)
    QB_Ok, RB_kr = torch.linalg.qr(B_Or)
    QA_Il, RA_lr = torch.linalg.qr(A_rI.T)
    core_kl = RB_kr @ RA_lr.T
    rank, found = A_rI.shape[0], min(core_kl.shape)
    left, values, right = torch.linalg.svd(core_kl, full_matrices=False)
    U_Or, S_r, V_rI = B_Or.new_zeros(B_Or.shape), A_rI.new_zeros(rank), A_rI.new_zeros(A_rI.shape)
    U_Or[:, :found] = QB_Ok @ left
    S_r[:found] = values
    V_rI[:found] = right @ QA_Il.T
    return U_Or, S_r, V_rI


def factored_singular_values(A_rI: Tensor, B_Or: Tensor) -> Tensor:
    """The singular values of B A alone: those of :func:`factored_svd`, for about half of the work.

    Returns:
        S_r (r,) in descending order, in float64 on the factors' device.

    Raises:
        ValueError: shapes do not fit together, or a factor holds NaN or infinity.
    """
    A_rI, B_Or = _checked(A_rI, B_Or)
    RB_kr = torch.linalg.qr(B_Or, mode="r").R
    RA_lr = torch.linalg.qr(A_rI.T, mode="r").R
    core_kl = RB_kr @ RA_lr.T
    S_r = A_rI.new_zeros(A_rI.shape[0])
    S_r[: min(core_kl.shape)] = torch.linalg.svdvals(core_kl)
    return S_r


def numerical_rank(S_r: Tensor, wide: int, tall: int) -> int:
    """How many singular values of a (tall, wide) matrix rounding can tell from zero, given them in descending order.

    The bound is the usual one: eps * max(wide, tall) * the largest value (eps of float64).
    """
    bound = torch.finfo(torch.float64).eps * max(wide, tall) * S_r[:1].double()
    return int((S_r.double() > bound).sum())


def _checked(A_rI: Tensor, B_Or: Tensor) -> tuple[Tensor, Tensor]:
    """The factors in float64."""
    if A_rI.dim() != 2 or B_Or.dim() != 2 or A_rI.shape[0] != B_Or.shape[1]:
        raise ValueError(f"factors A {tuple(A_rI.shape)} and B {tuple(B_Or.shape)} do not fit: expected (r, I), (O, r)")
    A_rI, B_Or = A_rI.detach().double(), B_Or.detach().double()
    for letter, factor in (("A", A_rI), ("B", B_Or)):
        if not bool(factor.isfinite().all()):
            raise ValueError(f"factor {letter} {tuple(factor.shape)} holds NaN or infinity: it has no singular values")
    return A_rI, B_Or
