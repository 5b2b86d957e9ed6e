"""Adapter forms: how an adapter is built around a frozen layer. Importing this file loads no torch.

A method's options name a form. The form knows its adapter's arithmetic (scaling, number of parameters, terms in the
orthogonality penalty) and how to wrap a layer. A new form is a class like these; there is no list to add it to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

    from salient_ds.adapters.module_score import ModuleScores
    from salient_ds.adapters.orthogonality import OrthogonalityPenalty
    from salient_ds.adapters.ranked_linear import RankedLinear


@dataclass(frozen=True, kw_only=True)
class Wrapping:
    """What every form needs to wrap one layer."""

    rank: int
    """Maximum number of rows of the adapter."""
    alpha: float
    """Numerator of the scaling."""
    dropout: float
    init_std: float
    generator: torch.Generator | None
    penalty: OrthogonalityPenalty | None
    """None for forms whose ``penalty_terms`` is 0."""
    scores: ModuleScores | None
    """Set only for methods that score whole matrices."""
    dtype: torch.dtype | None
    device: torch.device | None


class AdapterForm(Protocol):
    """One way to build an adapter."""

    penalty_terms: ClassVar[int]
    """Terms of one adapter in the orthogonality penalty; 0: no penalty. The SVD form has one for A and one for B."""

    def scaling(self, alpha: float, rank: int) -> float:
        """Factor that multiplies the update of a fresh adapter."""
        ...

    def parameters(self, in_features: int, out_features: int, rank: float) -> float:
        """Number of trainable elements of one adapter. ``rank`` may be a mean, so the result may be fractional."""
        ...

    def sigma_ratio(self, in_features: int, out_features: int, init_std: float) -> float:
        """How many times faster the singular values have to learn than the factors; 1 without singular values."""
        ...

    def wrap(self, base: nn.Linear, wrapping: Wrapping) -> RankedLinear:
        """Build the adapter around ``base``."""
        ...


class HasForm(Protocol):
    """What injection needs from a method's options."""

    @property
    def scoring_bytes(self) -> int:
        """Bytes for scoring whole matrices in backward passes; 0: no scoring."""
        ...

    def adapter_form(self, num_matrices: int, rank: int, in_flight: bool) -> AdapterForm:
        """The form of the adapters around ``num_matrices`` layers.

        ``in_flight``: growing adapters start with a few rows, and more are allocated during training.
        """
        ...


@dataclass(frozen=True)
class PlainForm:
    """B A with B = 0 at the start (LoRA, Hu et al. 2022)."""

    rank_stabilised: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA) instead of alpha / r."""
    penalty_terms: ClassVar[int] = 0

    def scaling(self, alpha: float, rank: int) -> float:
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def parameters(self, in_features: int, out_features: int, rank: float) -> float:
        return rank * (in_features + out_features)

    def sigma_ratio(self, in_features: int, out_features: int, init_std: float) -> float:
        return 1.0

    def wrap(self, base: nn.Linear, wrapping: Wrapping) -> RankedLinear:
        from salient_ds.adapters.ranked_linear import PlainLinear

        w = wrapping
        scaling = self.scaling(w.alpha, w.rank)
        return PlainLinear(
            base, w.rank, scaling, dropout=w.dropout, generator=w.generator, dtype=w.dtype, device=w.device
        )


@dataclass(frozen=True)
class SVDForm:
    """B diag(E) A with E = 0 at the start (AdaLoRA, SalientLoRA)."""

    rank_stabilised: bool = False
    """Scale by alpha / sqrt(r) (rsLoRA) instead of alpha / r."""
    penalty_terms: ClassVar[int] = 2

    def scaling(self, alpha: float, rank: int) -> float:
        return alpha / math.sqrt(rank) if self.rank_stabilised else alpha / rank

    def parameters(self, in_features: int, out_features: int, rank: float) -> float:
        return rank * (in_features + out_features + 1)

    def sigma_ratio(self, in_features: int, out_features: int, init_std: float) -> float:
        """sqrt(O / 3) / max(1, init_std^2 sqrt(O I)): LoRA's first step in the Frobenius norm.

        Adam moves every element by the learning rate in its first step. LoRA's B, from 0, then changes the update by
        lr sqrt(O r / 3), because a row of A has the norm sqrt(1 / 3). A singular value changes it by lr times the norms
        of its two vectors: init_std^2 sqrt(O I) at the start, and about 1 as soon as the penalty has made them
        orthonormal. The larger of the two counts, so that no step becomes longer than LoRA's once they are.
        """
        return math.sqrt(out_features / 3) / max(1.0, init_std**2 * math.sqrt(out_features * in_features))

    def wrap(self, base: nn.Linear, wrapping: Wrapping) -> RankedLinear:
        from salient_ds.adapters.ranked_linear import SVDLinear

        w = wrapping
        return SVDLinear(base, w.rank, self.scaling(w.alpha, w.rank), **_trained_as_svd(w))


@dataclass(frozen=True)
class TwoScaleForm(SVDForm):
    """bb aa diag(E) B A with a narrow inner width (LoRA^2)."""

    inner_width: int = 8
    penalty_terms: ClassVar[int] = 5

    def parameters(self, in_features: int, out_features: int, rank: float) -> float:
        """k (in + out) + 2 k r + r."""
        return self.inner_width * (in_features + out_features + 2 * rank) + rank

    def sigma_ratio(self, in_features: int, out_features: int, init_std: float) -> float:
        """As :meth:`SVDForm.sigma_ratio`; each of a value's two vectors is a product of two factors here."""
        start = init_std**4 * self.inner_width * math.sqrt(out_features * in_features)
        return math.sqrt(out_features / 3) / max(1.0, start)

    def wrap(self, base: nn.Linear, wrapping: Wrapping) -> RankedLinear:
        from salient_ds.adapters.two_scale import TwoScaleLinear

        w = wrapping
        return TwoScaleLinear(base, w.rank, self.inner_width, self.scaling(w.alpha, w.rank), **_trained_as_svd(w))


@dataclass(frozen=True)
class GrowingForm(SVDForm):
    """B diag(E) A with a growing number of active rows (IncreLoRA)."""

    start_rank: int = 1
    reserve: int = 0
    """Rows of each matrix that train before they are activated, while growth continues."""
    room: int | None = None
    """Rows allocated at the start; None: the maximum number of rows."""

    def scaling(self, alpha: float, rank: int) -> float:
        return alpha / self.start_rank

    def wrap(self, base: nn.Linear, wrapping: Wrapping) -> RankedLinear:
        from salient_ds.adapters.growing import GrowingLinear

        w = wrapping
        return GrowingLinear(
            base, w.rank, self.start_rank, self.reserve, w.alpha, scores=w.scores, room=self.room, **_trained_as_svd(w)
        )


def _trained_as_svd(w: Wrapping) -> dict[str, Any]:
    return {
        "dropout": w.dropout,
        "init_std": w.init_std,
        "generator": w.generator,
        "penalty": w.penalty,
        "dtype": w.dtype,
        "device": w.device,
    }
