"""How salient a module is: scores from factors and gradients (HeteroLoRA, arXiv 2406.14956).

Shape legend: R = rank, I/O = in/out features, A_RI, B_OR = factors of one module whose update is s B A x with
s = alpha / r, G_A, G_B = gradients with respect to them, M = candidate modules.

Gradients are those of each probe batch's mean loss. They are summed over batches and processes before they come here,
because a norm of a sum is not a sum of norms. All modules are on while gradients are taken. A higher score means more
salient.
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
"""Proxies that score 0 for every module with B = 0, whatever the data: dL/dA = s B^T ... = 0 and B dL/dB = 0."""


def check_proxy(name: str) -> None:
    """Refuse a name that is not a proxy for modules.

    Raises:
        ValueError: the name is unknown, or "jacob_cov".
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
    """CONSTANT: all modules score the same, so the seeded draw among ties decides."""
    return 1.0


def grad_norm(G_A: Tensor, G_B: Tensor) -> Tensor:
    """GRAD-NORM: ||G_A||_F + ||G_B||_F, the sum of two norms and not the norm of both; () float64."""
    return G_A.double().norm() + G_B.double().norm()


def snip(A_RI: Tensor, B_OR: Tensor, G_A: Tensor, G_B: Tensor) -> Tensor:
    """SNIP (Lee et al. 2019): sum |A * G_A| + sum |B * G_B|; () float64.

    The gradient with respect to an all-ones mask on a weight is the weight times its gradient, so no mask is needed.
    The reference defines SNIP for linear layers only. Here it scores shortcuts too.
    """
    return _connection_sensitivity(A_RI, G_A) + _connection_sensitivity(B_OR, G_B)


def fisher(A_RI: Tensor, G_A: Tensor) -> Tensor:
    """FISHER of one probe batch: 1/2 sum_k (sum_i A_ki G_A,ki)^2; () float64. The caller averages it over batches.

    The activations of a module are its R inner products A x. The gradient with respect to a gate on inner product k is
    sum_i A_ki G_A,ki. Half its square, averaged over samples, estimates the cost of removing k (Theis et al. 2018; as a
    proxy: Abdelfattah et al. 2021). Here a batch counts as one sample, so probe batches of one example give the
    published definition. The reference names FISHER but does not implement it.
    """
    return 0.5 * (A_RI.double() * G_A.double()).sum(1).square().sum()


def _connection_sensitivity(weight: Tensor, gradient: Tensor) -> Tensor:
    return (weight.double() * gradient.double()).abs().sum()


def proxy_score(
    proxy: str, A_RI: Tensor, B_OR: Tensor, G_A: Tensor, G_B: Tensor, *, scaling: float, scale_free: bool = False
) -> float:
    """Score of one module by GRAD-NORM, SNIP or SYNFLOW.

    SYNFLOW, as released, is SNIP's formula with gradients of the network of absolute values. Parameters and buffers are
    replaced by their absolute values and input embeddings by ones. The labels and the mask of one batch stay. So,
    unlike the published SynFlow (Tanaka et al. 2020), it uses data and does not sum outputs. Its values fall by orders
    of magnitude from layer to layer towards the input, so it ranks modules by depth.

    Args:
        scaling: the module's s = alpha / r.
        scale_free: divide the gradients by s. The result is the score that the same factors would have if their product
            were not multiplied by alpha / r, everything else in the model being equal. A module's alpha then has no
            influence on its score at B = 0. Without this, kinds of modules with a larger alpha / r are favoured in
            proportion (16 / r against 4 / r in the released settings). The rank still has an influence: more rows give
            more gradient.
    """
    if proxy == "grad_norm":
        score = grad_norm(G_A, G_B)
    else:
        assert proxy in ("snip", "synflow"), proxy
        score = snip(A_RI, B_OR, G_A, G_B)
    return float(score) / (scaling if scale_free else 1.0)


@dataclass(frozen=True)
class MetricLimit:
    """How far a metric may get worse before a module counts as needed."""

    value: float
    higher_is_better: bool

    @staticmethod
    def of(
        baseline: float,
        tolerance: float,
        metric: Literal["accuracy", "perplexity"] = "perplexity",
        phase: Literal["static", "dynamic"] = "static",
    ) -> MetricLimit:
        """The reference's limits for a baseline m and a tolerance t.

        Accuracy: m (1 - t). Perplexity: m (1 + t) in phase "static", m + t / m in phase "dynamic" (while training).
        """
        if metric == "accuracy":
            return MetricLimit(baseline - baseline * tolerance, True)
        return MetricLimit(baseline + (baseline * tolerance if phase == "static" else tolerance / baseline), False)

    def crossed(self, value: float) -> bool:
        """Whether the metric is beyond the limit. NaN counts as beyond."""
        return math.isnan(value) or (value < self.value if self.higher_is_better else value > self.value)


def alpha_test(metric: Callable[[float], float], limit: MetricLimit, levels: int = 10) -> int:
    """ALPHA-TEST: the smallest k in 0 .. levels for which ``metric(k / levels)`` stays within the limit.

    It is found by bisection, as in the reference, so the result is exact if the metric is monotone. k = levels is
    assumed to be within the limit.

    Args:
        metric: sets the module's ``importance`` and measures the model over all processes. The importance is a factor
            on a linear layer's whole output, or on a shortcut's low-rank part.
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
    """non_finite: skip the event. degenerate, locked_in: rank by another proxy (GRAD-NORM), or stop."""
    reason: str = ""
    """A sentence for the user; empty if the kind is "ok"."""


def check_scores(proxy: str, names: Sequence[str], score_M: Tensor, trained_M: Tensor | None = None) -> ScoreCheck:
    """Detect scores that cannot rank modules, before they are used.

    SNIP and SYNFLOW are zero for every module at the start. The reference then draws modules at random and trains them.
    From then on only these modules have scores above zero: the draw is locked in for the whole run.

    Args:
        trained_M: bool, True where B of a module differs from zero. None if that is unknown; then only scores that are
            zero for all modules are detected.
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
