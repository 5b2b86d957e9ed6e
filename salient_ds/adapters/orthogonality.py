"""The orthogonality penalty of SVD-form and two-scale adapters, added through its analytic gradient.

Shape legend: M = adapted matrices, R = rank, I/O = in/out features; a factor is A (R, I) or B (O, R). Two-scale
form: k = inner width, factors A (k, I), B (R, k), aa (k, R), bb (O, k).

The gradient of ||A A^T - I||_F with respect to A is 2 (A A^T - I) A / ||A A^T - I||_F. It is added where A's own
gradient is formed. Under ZeRO-3, A is gathered there anyway, so the penalty costs no communication. It needs no term in
the loss, and it runs exactly once per backward pass even if the forward pass is recomputed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

TwoScaleFactors = tuple[Tensor, Tensor, Tensor, Tensor]
"""A (k, I), B (R, k), aa (k, R), bb (O, k)."""

TINY = 1e-12  # the norm is not differentiable at 0, where the residual, and so the gradient, counts as 0


class OrthogonalityPenalty:
    """Controller shared by all adapters of a model. The training loop arms it for one backward pass per step.

    Forms (``coefficient`` c, M matrices):
        mean_norm: c / (2 M) * sum_k (||A_k A_k^T - I||_F + ||B_k^T B_k - I||_F), as in the released code of AdaLoRA,
            SalientLoRA and PEFT.
        squared: c * sum_k (||A_k A_k^T - I||_F^2 + ||B_k^T B_k - I||_F^2), as in the papers (AdaLoRA Eq. 4).

    Two-scale adapters have five terms per matrix instead of two (``terms``); see :func:`two_scale_residuals`.

    Rows switched off by ``mask_R`` are removed from the Gram matrix and from the identity that it is compared with. So
    the penalty is that of a smaller adapter without these rows.
    """

    def __init__(
        self, num_modules: int, coefficient: float, form: Literal["mean_norm", "squared"], terms: int = 2
    ) -> None:
        self.num_modules = num_modules
        self.terms = terms
        self.coefficient = coefficient
        self.form = form
        self.armed = False
        self.gradient_scale = 1.0
        self._norms_M2: Tensor | None = None
        self._noted: list[tuple[Tensor, int, Tensor]] = []

    def arm(self, gradient_scale: float, device: torch.device) -> None:
        """Add the penalty's gradient in the next backward pass, times ``gradient_scale`` (the fp16 loss scale)."""
        self.armed = True
        self.gradient_scale = gradient_scale
        self._norms_M2 = torch.zeros(self.num_modules, self.terms, device=device)
        self._noted.clear()

    @property
    def norms_M2(self) -> Tensor | None:
        """Norm of every term in the last armed pass, (M, terms)."""
        if self._noted and self._norms_M2 is not None:  # a few large writes instead of one per stack of factors
            for term in {term for _, term, _ in self._noted}:
                pairs = [(slots, norms) for slots, which, norms in self._noted if which == term]
                self._norms_M2[torch.cat([slots for slots, _ in pairs]), term] = torch.cat([n for _, n in pairs])
            self._noted.clear()
        return self._norms_M2

    def note(self, slots: Tensor, term: int, norms: Tensor) -> None:
        """Record the norms (n,) of one term for the matrices ``slots`` (n,) int64."""
        self._noted.append((slots, term, norms))

    @contextlib.contextmanager
    def collect_notes(self) -> Iterator[list[tuple[Tensor, int, Tensor]]]:
        """Inside the context, norms are only recorded in the list that this yields."""
        before, self._noted = self._noted, []
        try:
            yield self._noted
        finally:
            self._noted = before

    def disarm(self) -> None:
        self.armed = False

    def attach(self, factor: Tensor, mask_R: Tensor | None, rank_axis: int, slot: tuple[int, int]) -> Tensor:
        """Return ``factor`` unchanged. If armed, hook the penalty's gradient to its backward pass.

        If ZeRO-3 partitions the adapters, ``factor`` must be the leaf parameter itself: it gathers a saved parameter
        again for the backward pass, but not a view.
        """
        if not self.armed:
            return factor
        out: Tensor = _AddPenaltyGradient.apply(factor, mask_R, rank_axis, slot, self)
        return out

    def attach_two_scale(self, factors: TwoScaleFactors, mask_R: Tensor | None, module: int) -> TwoScaleFactors:
        """As :meth:`attach`, but for the four factors (A, B, aa, bb) of a two-scale adapter at once."""
        if not self.armed:
            return factors
        out: TwoScaleFactors = _AddTwoScaleGradient.apply(*factors, mask_R, module, self)
        return out

    def value(self) -> Tensor:
        """The penalty of the last armed pass, coefficient included (0-dim tensor)."""
        norms_M2 = self.norms_M2
        assert norms_M2 is not None, "value() before the first armed backward pass"
        if self.form == "squared":
            return self.coefficient * norms_M2.square().sum()
        return self.coefficient * norms_M2.mean()

    def gradient_factor(self, norm: Tensor) -> Tensor:
        """Multiplier of (A A^T - I) A in the gradient, given the norm of the residual."""
        if self.form == "squared":
            return torch.full_like(norm, 4.0 * self.coefficient * self.gradient_scale)
        weight = 2.0 * self.coefficient * self.gradient_scale / (self.terms * self.num_modules)
        return weight / norm.clamp_min(TINY)


def gram_residual(factor: Tensor, mask_R: Tensor | None, rank_axis: int) -> Tensor:
    """A A^T - I (or B^T B - I) in fp32, with masked rows taken out of both terms; shape (R, R)."""
    wide = factor if rank_axis == 0 else factor.t()
    if wide.is_cuda and wide.dtype != torch.float32:
        # bf16 operands, fp32 accumulation and result: products of two bf16 numbers are exact in fp32
        residual_RR = torch.mm(wide, wide.t(), out_dtype=torch.float32)
    else:
        wide = wide.float()
        residual_RR = wide @ wide.t()
    residual_RR.diagonal().sub_(1.0)
    if mask_R is not None:  # cheaper here than on the factor, and removes a row from product and identity alike
        off_R = ~mask_R
        residual_RR.masked_fill_(off_R.unsqueeze(1), 0.0).masked_fill_(off_R, 0.0)
    return residual_RR


class _AddPenaltyGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        factor: Tensor,
        mask_R: Tensor | None,
        rank_axis: int,
        slot: tuple[int, int],
        penalty: OrthogonalityPenalty,
    ) -> Tensor:
        ctx.save_for_backward(factor)
        ctx.mask_R, ctx.rank_axis, ctx.slot, ctx.penalty = mask_R, rank_axis, slot, penalty
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None, None]:
        (factor,) = ctx.saved_tensors
        penalty: OrthogonalityPenalty = ctx.penalty
        residual_RR = gram_residual(factor.detach(), ctx.mask_R, ctx.rank_axis)
        norm = torch.linalg.vector_norm(residual_RR)
        assert penalty.norms_M2 is not None
        penalty.norms_M2[ctx.slot].copy_(norm)
        if penalty.coefficient == 0:
            return grads[0], None, None, None, None
        # A masked row of the residual is zero, so that row of the factor neither receives nor contributes gradient.
        scaled_RR = residual_RR.mul_(penalty.gradient_factor(norm)).to(factor.dtype)
        pair = (scaled_RR, factor.detach()) if ctx.rank_axis == 0 else (factor.detach(), scaled_RR)
        return torch.addmm(grads[0], *pair), None, None, None, None


@dataclass(frozen=True)
class TwoScaleResiduals:
    """The five terms of one two-scale adapter, fp32. Masked ranks are removed from B and aa."""

    A_kk: Tensor
    """A A^T - I."""
    B: Tensor
    """B^T B - I (k, k), or B B^T - I (R, R) if R < k."""
    aa: Tensor
    """aa aa^T - I (k, k), or aa^T aa - I (R, R) if R < k."""
    bb_kk: Tensor
    """bb^T bb - I."""
    inner_kk: Tensor
    """aa B: how far the two planes are from being orthogonal, in their own coordinates."""

    def norms(self) -> Tensor:
        """Frobenius norms of the four factors' own terms and of the cross term bb aa B A, (5,)."""
        own = [r.norm() for r in (self.A_kk, self.B, self.aa, self.bb_kk)]
        # ||bb X A||^2 = <X, (bb^T bb) X (A A^T)>: the dense product is never formed
        cross = (self.inner_kk * self.pushed_kk()).sum().clamp_min(0).sqrt()
        return torch.stack([*own, cross])

    def pushed_kk(self) -> Tensor:
        """(bb^T bb) (aa B) (A A^T), half the gradient of the squared cross term with respect to aa B."""
        eye_kk = torch.eye(len(self.A_kk), device=self.A_kk.device)
        return (self.bb_kk + eye_kk) @ self.inner_kk @ (self.A_kk + eye_kk)


def two_scale_residuals(factors: TwoScaleFactors, mask_R: Tensor | None) -> TwoScaleResiduals:
    """What the penalty of LoRA^2 measures: the orthogonality of every factor, and that of the two planes to each other.

    The planes are those of the two LoRAs, B A and bb aa, inside the R-dimensional space that they share. The cross
    term is ||(A^T B^T)(aa^T bb^T)||_F = ||bb aa B A||_F. If A and bb have full rank, it is zero if and only if the
    planes are orthogonal.

    Differs from the reference, whose regulariser always raises an error. The reference would have required B^T B and
    aa aa^T to be the identity even if R < k, which their rank rules out; here the feasible side is used instead. It
    also forms the cross product from detached tensors, and does not use it.

    Both planes have dimension min(k, R). So the cross term can vanish together with the others only if R >= 2 k. Below
    that it is at least sqrt(2 k - R), or sqrt(R) if R <= k.
    """
    A_kI, B_Rk, aa_kR, bb_Ok = factors
    if mask_R is not None:
        B_Rk, aa_kR = B_Rk * mask_R.unsqueeze(1).to(B_Rk.dtype), aa_kR * mask_R.to(aa_kR.dtype)
    narrow = len(B_Rk) < len(A_kI)
    inner_mask = mask_R if narrow else None
    return TwoScaleResiduals(
        A_kk=gram_residual(A_kI, None, 0),
        B=gram_residual(B_Rk, inner_mask, 0 if narrow else 1),
        aa=gram_residual(aa_kR, inner_mask, 1 if narrow else 0),
        bb_kk=gram_residual(bb_Ok, None, 1),
        inner_kk=aa_kR.float() @ B_Rk.float(),
    )


class _AddTwoScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        A_kI: Tensor,
        B_Rk: Tensor,
        aa_kR: Tensor,
        bb_Ok: Tensor,
        mask_R: Tensor | None,
        module: int,
        penalty: OrthogonalityPenalty,
    ) -> TwoScaleFactors:
        ctx.save_for_backward(A_kI, B_Rk, aa_kR, bb_Ok)
        ctx.mask_R, ctx.module, ctx.penalty = mask_R, module, penalty
        return A_kI.view_as(A_kI), B_Rk.view_as(B_Rk), aa_kR.view_as(aa_kR), bb_Ok.view_as(bb_Ok)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        penalty: OrthogonalityPenalty = ctx.penalty
        factors = tuple(factor.detach() for factor in ctx.saved_tensors)
        residuals = two_scale_residuals(factors, ctx.mask_R)
        norms_5 = residuals.norms()
        assert penalty.norms_M2 is not None
        penalty.norms_M2[ctx.module] = norms_5
        if penalty.coefficient == 0:
            return (*grads, None, None, None)
        weight_5 = penalty.gradient_factor(norms_5)
        # a cross norm of 0 may come from rounding; the gradient that it would divide is then not quite 0
        weight_5[4] *= norms_5[4] > TINY
        extras = _two_scale_gradient(factors, residuals, weight_5, ctx.mask_R)
        return (*(grad + extra for grad, extra in zip(grads, extras, strict=True)), None, None, None)


def _two_scale_gradient(
    factors: TwoScaleFactors, residuals: TwoScaleResiduals, weight_5: Tensor, mask_R: Tensor | None
) -> TwoScaleFactors:
    """Gradient of the weighted terms with respect to A, B, aa, bb, in the factors' dtype."""
    A_kI, B_Rk, aa_kR, bb_Ok = factors
    own_A, own_B, own_aa, own_bb, cross = weight_5.unbind()
    cross = cross / 2  # the own terms are quadratic in their factor, the cross term is linear in each
    inner_kk, pushed_kk = residuals.inner_kk, residuals.pushed_kk()
    eye_kk = torch.eye(len(A_kI), device=A_kI.device)
    left_A = own_A * residuals.A_kk + cross * inner_kk.T @ (residuals.bb_kk + eye_kk) @ inner_kk
    right_bb = own_bb * residuals.bb_kk + cross * inner_kk @ (residuals.A_kk + eye_kk) @ inner_kk.T
    narrow = len(B_Rk) < len(A_kI)
    B, aa = B_Rk.float(), aa_kR.float()
    extra_B = own_B * (residuals.B @ B if narrow else B @ residuals.B) + cross * aa.T @ pushed_kk
    extra_aa = own_aa * (aa @ residuals.aa if narrow else residuals.aa @ aa) + cross * pushed_kk @ B.T
    if mask_R is not None:
        extra_B, extra_aa = extra_B * mask_R.unsqueeze(1), extra_aa * mask_R
    dtype = A_kI.dtype
    return left_A.to(dtype) @ A_kI, extra_B.to(dtype), extra_aa.to(dtype), bb_Ok @ right_bb.to(dtype)
