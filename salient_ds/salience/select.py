"""Which singular values are kept, given their scores and a budget.

Shape legend: N = values in module-major order, so that "lower row" means (earlier module, lower row in it).
"""

from __future__ import annotations

import torch
from torch import Tensor


def select_exact(score_N: Tensor, budget: int, live_N: Tensor) -> Tensor:
    """Keep exactly ``budget`` of the live values: the highest scores; among equal scores, the lower rows.

    NaN counts as the lowest score. A budget above the number of live values keeps all of them; pruned values do not
    come back.

    Returns:
        bool (N,), on the scores' device.
    """
    assert budget >= 0 and score_N.shape == live_N.shape
    live_N = live_N.to(score_N.device)
    ranked_N = torch.where(live_N & ~score_N.isnan(), score_N, float("-inf"))
    # two stable sorts, by score and then live before dead: a live value of score -inf still beats a dead one
    by_score_N = torch.argsort(ranked_N, descending=True, stable=True)
    order_N = by_score_N[torch.argsort(live_N[by_score_N].to(torch.uint8), descending=True, stable=True)]
    mask_N = torch.zeros_like(live_N)
    mask_N[order_N[:budget]] = True
    return mask_N & live_N


def reference_threshold(score_N: Tensor, budget: int) -> float:
    """The (N - budget)-th smallest score, with NaN as the largest; -inf if the budget covers all values."""
    dropped = len(score_N) - budget
    if dropped <= 0:
        return float("-inf")
    return float(torch.sort(score_N).values[dropped - 1])


def select_threshold(score_N: Tensor, budget: int) -> Tensor:
    """Keep the values strictly above :func:`reference_threshold` (the released code's rule).

    All values tied with the threshold are dropped, so fewer than ``budget`` may remain. NaN is never above anything. So
    a NaN value is dropped too, although it has taken one of the places. With at least ``budget`` NaN values, nothing
    remains.

    Returns:
        bool (N,), on the scores' device.
    """
    return score_N > reference_threshold(score_N, budget)


def score_at_cut(score_N: Tensor, mask_N: Tensor, live_N: Tensor) -> float:
    """Highest score among the live values that are dropped, for the log; NaN if all of them stay."""
    gone = score_N[live_N.to(score_N.device) & ~mask_N]
    return float(gone.max()) if len(gone) else float("nan")


def select_within(score_N: Tensor, cost_N: Tensor, budget: float, live_N: Tensor) -> Tensor:
    """Keep live values in the order of :func:`select_exact`, as long as their costs fit into ``budget``.

    A value that no longer fits is skipped, and cheaper ones after it are tried. So what is left of the budget at the
    end is less than the cheapest skipped value costs.

    Args:
        cost_N: cost of each value, above 0.

    Returns:
        bool (N,), on the scores' device.
    """
    live_N, cost_N = live_N.to(score_N.device), cost_N.to(score_N.device)
    count = int(live_N.sum())
    order_N = torch.argsort(
        torch.where(live_N & ~score_N.isnan(), score_N, float("-inf")), descending=True, stable=True
    )
    order_N = order_N[torch.argsort(live_N[order_N].to(torch.uint8), descending=True, stable=True)][:count]
    spent_N = cost_N[order_N].double().cumsum(0)
    first = int((spent_N <= budget).sum())
    chosen = order_N[:first].tolist()
    left = budget - (float(spent_N[first - 1]) if first else 0.0)
    for row, cost in zip(order_N[first:].tolist(), cost_N[order_N[first:]].tolist(), strict=True):
        if cost <= left:
            chosen.append(row)
            left -= cost
    mask_N = torch.zeros_like(live_N)
    mask_N[torch.tensor(chosen, dtype=torch.int64, device=mask_N.device)] = True
    return mask_N
