"""How salient a module is: scores from factors and gradients (HeteroLoRA, arXiv 2406.14956).

Shape legend: R = rank, I/O = in/out features, A_RI, B_OR = factors of one module whose update is s B A x with
s = alpha / r, G_A, G_B = gradients with respect to them, M = candidate modules.

Gradients are those of the mean loss of every probe batch, summed over batches, and over processes, before they come
here: a norm of a sum is not a sum of norms. All modules are on while they are taken. Higher is more salient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

PROXIES = ("constant", "grad_norm", "snip", "synflow", "alpha_test", "fisher")
ZERO_WHILE_UNTRAINED = ("snip", "synflow", "fisher")
"""Scores that are 0 for every module with B = 0, whatever the data say: dL/dA = s B^T ... = 0 and B dL/dB = 0."""


def check_proxy(name: str) -> None:
    """Refuse what is no proxy of modules.

    Raises:
        ValueError: the name is unknown, or JACOB-COV's.
    """
    if name == "jacob_cov":
        raise ValueError(
            "method.proxy='jacob_cov': the covariance of input Jacobians scores a whole network (Mellor et al. 2021), "
            f"and no share of it for a single module is defined; the released code never wrote it. Choose one of "
            f"{', '.join(PROXIES)}"
        )
    if name not in PROXIES:
        raise ValueError(f"method.proxy={name!r} is unknown: choose one of {', '.join(PROXIES)}")


def constant() -> float:
    """CONSTANT: all modules are equal, so that the seeded draw among ties decides."""
    return 1.0


def grad_norm(G_A: Tensor, G_B: Tensor) -> Tensor:
    """GRAD-NORM: ||G_A||_F + ||G_B||_F, the sum of two norms and not the norm of both; () float64."""
    return G_A.double().norm() + G_B.double().norm()


def snip(A_RI: Tensor, B_OR: Tensor, G_A: Tensor, G_B: Tensor) -> Tensor:
    """SNIP (Lee et al. 2019): sum |A * G_A| + sum |B * G_B|; () float64.

    The gradient with respect to an all-ones mask on a weight is the weight times its gradient, so that no mask is
    needed. The reference defines it for linear layers; here for shortcuts too.
    """
    return _connection_sensitivity(A_RI, G_A) + _connection_sensitivity(B_OR, G_B)


def fisher(A_RI: Tensor, G_A: Tensor) -> Tensor:
    """FISHER of one probe batch: 1/2 sum_k (sum_i A_ki G_A,ki)^2; () float64. To be averaged over batches.

    The activations of a module are its R inner products A x. The gradient with respect to a gate on inner product k is
    sum_i A_ki G_A,ki, and half its square, averaged over samples, estimates what cutting k costs (Theis et al. 2018;
    as a proxy: Abdelfattah et al. 2021). A batch counts as one sample here, so that probe batches of one example give
    the published definition. The reference names it without writing it.
    """
    return 0.5 * (A_RI.double() * G_A.double()).sum(1).square().sum()


def _connection_sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight.double() * gradient.double()).abs().sum()


def proxy_score(
    proxy: str, A_RI: Tensor, B_OR: Tensor, G_A: Tensor, G_B: Tensor, *, scaling: float, scale_free: bool = False
) -> float:
    """Score of one module by GRAD-NORM, SNIP or SYNFLOW.

    SYNFLOW as released is SNIP's formula with gradients taken in the network of absolute values: parameters and buffers
    are replaced by their absolute values and input embeddings by ones, while the labels and mask of one batch stay.
    Unlike SynFlow as published (Tanaka et al. 2020) that is neither free of data nor a sum of outputs. Values fall by
    orders of magnitude from layer to layer towards the input, so that it ranks by depth.

    Args:
        scaling: the module's s = alpha / r.
        scale_free: divide the gradients by s: the score that the same factors would have if their product were not
            multiplied by alpha / r, everything else in the model being equal. A module's alpha then has no part in its
            score at B = 0. Without, kinds of modules with a larger alpha / r are favoured in proportion (16 / r against
            4 / r in the released settings). Their rank still counts: more rows, more gradient.
    """
    if proxy == "grad_norm":
        score = grad_norm(G_A, G_B)
    else:
        assert proxy in ("snip", "synflow"), proxy
        score = snip(A_RI, B_OR, G_A, G_B)
    return float(score) / (scaling if scale_free else 1.0)


@dataclass(frozen=True)
class MetricLimit:
    """How far a metric may go before a module counts as needed."""

    value: float
    higher_is_better: bool

    @staticmethod
    def of(
        baseline: float,
        tolerance: float,
        metric: Literal["accuracy", "perplexity"] = "perplexity",
        phase: Literal["static", "dynamic"] = "static",
    ) -> MetricLimit:
        """The reference's limits: m (1 - t) for accuracies; for perplexities m (1 + t), or m + t / m while training."""
        if metric == "accuracy":
            return MetricLimit(baseline - baseline * tolerance, True)
        return MetricLimit(baseline + (baseline * tolerance if phase == "static" else tolerance / baseline), False)

    def crossed(self, value: float) -> bool:
        """Whether the metric is beyond the limit. NaN is."""
        return math.isnan(value) or (value < self.value if self.higher_is_better else value > self.value)


def alpha_test(metric: Callable[[float], float], limit: MetricLimit, levels: int = 10) -> int:
    """ALPHA-TEST: the smallest k in 0 .. levels for which ``metric(k / levels)`` stays within the limit.

    Found by bisection, as the reference, hence exact if the metric is monotone; k = levels is taken as within.

    Args:
        metric: sets the module's ``importance`` (a factor on a linear layer's whole output, on a shortcut's low-rank
            part) and measures the model, over all processes.
    """
    low, high = 0, levels
    while low < high:
        middle = (low + high) // 2
        if limit.crossed(metric(middle / levels)):
            low = middle + 1
        else:
            high = middle
    return low


@dataclass(frozen=True)
class ScoreCheck:
    """Whether scores can rank modules."""

    kind: Literal["ok", "non_finite", "degenerate", "locked_in"]
    """non_finite: skip the event; degenerate, locked_in: rank by another proxy (GRAD-NORM), or stop."""
    reason: str = ""
    """A sentence for the user; empty if all is well."""


def check_scores(proxy: str, names: Sequence[str], score_M: Tensor, trained_M: Tensor | None = None) -> ScoreCheck:
    """Look for scores that say nothing, before modules are ranked by them.

    SNIP and SYNFLOW are zero for every module at the start. The reference then draws the modules at random, trains
    those, and from then on only these have scores above zero: the draw is locked in for the whole run.

    Args:
        trained_M: bool, whether B of a module differs from zero; None: not known, then only scores that are zero for
            all modules are found.
    """
    assert len(names) == len(score_M)
    finite_M = torch.isfinite(score_M)
    if not bool(finite_M.all()):
        wrong = [names[i] for i in (~finite_M).nonzero().flatten().tolist()]
        return ScoreCheck(
            "non_finite", f"{proxy} is not finite for {len(wrong)} of {len(names)} modules ({wrong[0]}, ...)"
        )
    if proxy not in ZERO_WHILE_UNTRAINED:
        return ScoreCheck("ok")
    because = f"{proxy} is 0 for a module whose B is 0, whatever the data say"
    if not bool(score_M.any()):
        return ScoreCheck("degenerate", f"{because}, and so for all {len(names)} modules: the choice would be a draw")
    if trained_M is not None and not bool(trained_M.all()):
        count = int((~trained_M).sum())
        return ScoreCheck(
            "locked_in", f"{because}: {count} of {len(names)} modules have not been trained and could not win"
        )
    return ScoreCheck("ok")
