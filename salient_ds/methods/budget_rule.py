"""Which rows a budget keeps: ``method.budget_unit``. Importing this file loads no torch.

Shape legend: N = rows that exist now, L = those of them that are ranked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from salient_ds.methods.options import TargetConfig
from salient_ds.ranks import Event, RankLayout

if TYPE_CHECKING:
    from torch import Tensor


class BudgetRule:
    """Keeps the rows with the highest scores, as many as the budget allows.

    With ``budget_unit: ranks``, a budget is a number of rows. With ``parameters`` it is the number of parameters that
    uniform adapters of the same total rank would have. Then rows are compared by their gain per parameter, because a
    row of a wide matrix takes the place of several narrow ones.
    """

    def __init__(self, config: TargetConfig, layout: RankLayout) -> None:
        self.parameters = config.budget_unit == "parameters"
        sides = zip(layout.in_features, layout.out_features, strict=True)
        form = config.adapter_form(len(layout.ranks), max(layout.ranks, default=1))
        self._cost_M = [form.parameters(wide, tall, 2) - form.parameters(wide, tall, 1) for wide, tall in sides]
        self._initial_ranks = layout.ranks
        self._target = config.wanted_total(len(layout.ranks))

    def allowed(self, total_rank: int) -> float:
        """Elements of rows that ``total_rank`` stands for: all at the initial total, those of uniform ranks at the end.

        In between it is linear in the total rank.
        """
        count = len(self._cost_M)
        everything = sum(rank * cost for rank, cost in zip(self._initial_ranks, self._cost_M, strict=True))
        target = self._target * sum(self._cost_M) / count
        initial = sum(self._initial_ranks)
        share = 1.0 if initial == self._target else (total_rank - self._target) / (initial - self._target)
        return target + share * (everything - target)

    def cost(self, layout: RankLayout) -> Tensor:
        """Number of elements of each row (N,) float64."""
        import torch

        return torch.tensor(self._cost_M, dtype=torch.float64)[layout.module_of_row_N]

    def per_parameter(
        self, gain_L: Tensor, layout: RankLayout, live_N: Tensor | None = None, power: float = 1.0
    ) -> Tensor:
        """``gain_L`` as it is, or divided by the cost of each row to the ``power``.

        Args:
            live_N: which rows of ``layout`` the gains belong to; None: all.
        """
        if not self.parameters:
            return gain_L
        cost_N = self.cost(layout)
        cost_L = cost_N if live_N is None else cost_N[live_N.to(cost_N.device)]
        return gain_L / cost_L.to(gain_L) ** power

    def select(self, score_N: Tensor, event: Event, live_N: Tensor, layout: RankLayout) -> Tensor:
        """The rows to keep (bool, N): those with the highest scores. Pruned rows do not come back."""
        from salient_ds.salience.select import select_exact, select_within

        if not self.parameters:
            return select_exact(score_N, event.total_rank, live_N)
        return select_within(score_N, self.cost(layout), self.allowed(event.total_rank), live_N)
