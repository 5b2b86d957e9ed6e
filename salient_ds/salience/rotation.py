"""Rotate the factors of one matrix into the singular basis of their product, and Adam's moments with them.

Shape legend: I/O = in/out features of the matrix, r = rows that are rotated.

The product B A stays as it is. Afterwards row i of A and column i of B belong to the i-th largest singular value of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from salient_ds.salience.factored_svd import factored_svd

SECOND_MOMENT = "exp_avg_sq"
"""Name of Adam's second moment. Every other moment is taken to be linear in the gradient."""


@dataclass(frozen=True)
class Factors:
    """The two factors of one matrix, and the optimizer's moments of each by name; all of one device."""

    A_rI: Tensor
    B_Or: Tensor
    moments_A: dict[str, Tensor]
    moments_B: dict[str, Tensor]


@dataclass(frozen=True)
class Rotated:
    """The rotated factors, and what they say about each row."""

    factors: Factors
    sigma_r: Tensor
    """Singular values of B A, falling (float64)."""
    curvature_r: Tensor
    """Sum over the column of B of value^2 times Adam's second moment (float64); 0 without moments.

    It estimates, up to a factor that all rows share, how much the loss grows if the row is removed: half the diagonal
    of the Fisher matrix, times the change squared.
    """


def rotate(factors: Factors) -> Rotated:
    """Rotate into the singular basis of B A = U diag(S) V.

    A becomes a V and B becomes U diag(S) / a, where a is the root mean square norm of A's rows. So Adam's next steps
    change the product as much as before. The sign of a row of V is free; its largest element is made positive.

    Moments: with A' = R A and B' = B R^-1, gradients become R^-T G_A and G_B R^T. First moments follow exactly. Second
    moments are squares, so what they become depends on how the gradients of different rows go together. Two models give
    a value each: rows do not correlate, and rows correlate as the rows of the other factor do (the gradient of A is B^T
    times the gradient of the product, taken to be the same in all directions). The larger value is used. With the first
    model alone, the strongest rows take Adam steps that are 1.2 to 2 times too long, because in training all rows of a
    wide adapter learn the strongest direction. Computed in float64; results have the types of the arguments.
    """
    A_rI, B_Or = factors.A_rI.double(), factors.B_Or.double()
    U_Or, sigma_r, V_rI = factored_svd(A_rI, B_Or)
    sign_r = V_rI.gather(1, V_rI.abs().argmax(1, keepdim=True)).sign().view(-1)
    U_Or, V_rI = U_Or * sign_r, V_rI * sign_r[:, None]
    length = A_rI.square().sum(1).mean().sqrt()
    if not length > 0:  # an A of zeros stays one, and has no direction
        length = torch.ones_like(length)
    inverse_rr = A_rI @ V_rI.T / length  # A = R^-1 A'
    forward_rr = torch.linalg.pinv(inverse_rr)
    new_B_Or, new_A_rI = U_Or * (sigma_r / length), V_rI * length
    moments_A = _follow(factors.moments_A, inverse_rr.T, _shares(new_B_Or.T, B_Or))
    moments_B = _transposed(_follow(_transposed(factors.moments_B), forward_rr, _shares(new_A_rI, A_rI)))
    curvature_r = torch.zeros_like(sigma_r)
    if SECOND_MOMENT in moments_B:
        curvature_r = (new_B_Or.square() * moments_B[SECOND_MOMENT].double()).sum(0)
    rotated = Factors(new_A_rI.to(factors.A_rI), new_B_Or.to(factors.B_Or), moments_A, moments_B)
    return Rotated(rotated, sigma_r, curvature_r)


def _shares(new_rX: Tensor, old: Tensor) -> Tensor:
    """Squared norm of each new row of a factor, relative to that of the whole former factor (r, 1); 0 if it is 0."""
    whole = old.square().sum()
    return new_rX.square().sum(1, keepdim=True) / torch.where(whole > 0, whole, torch.ones_like(whole))


def _transposed(moments: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: moment.T for name, moment in moments.items()}


def _follow(moments: dict[str, Tensor], map_rr: Tensor, share_r1: Tensor) -> dict[str, Tensor]:
    """The moments (r, X) of a factor whose gradient is multiplied by ``map_rr`` from the left.

    Args:
        share_r1: shares of the other factor's new rows in its squared norm.
    """
    found = {}
    for name, moment in moments.items():
        value_rX = moment.double()
        if name == SECOND_MOMENT:
            apart_rX, together_rX = map_rr.square() @ value_rX, share_r1 * value_rX.sum(0)
            found[name] = torch.maximum(apart_rX, together_rX).to(moment)
        else:
            found[name] = (map_rr @ value_rX).to(moment)
    return found
