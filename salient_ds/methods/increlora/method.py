"""IncreLoRA (Zhang et al. 2023): at each event, ranks grow in the matrices whose update matters most to the loss.

Shape legend: M = adapted matrices, R = rows allocated for one matrix, N = sum of all R.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from salient_ds.adapters.growing import RESERVE_SIGMA
from salient_ds.methods.base import refuse_non_finite
from salient_ds.methods.increlora.growth import (
    Growth,
    grow_exact,
    grow_threshold,
    more_room,
)
from salient_ds.methods.increlora.options import IncreLoRAConfig
from salient_ds.methods.increlora.row_rates import NEVER, RowRates, runs_of
from salient_ds.ranks import Event, MaskPolicy, Part, RankDecision, RankLayout, ReadShard, StepView
from salient_ds.salience import sensitivity
from salient_ds.salience.learning_rate import RatePlan
from salient_ds.salience.sensitivity import Smoothed


class IncreLoRA:
    """Smooths one score per matrix. At each event, the highest-scoring matrices activate more rows, up to the target.

    The score is sum |dW o dL/ddW| / sqrt(O I) (see :func:`salient_ds.adapters.module_score.module_score`), smoothed
    like AdaLoRA's sensitivity: S = Ibar Ubar. A matrix that grows activates its reserve rows, which start with singular
    value 1e-5, and puts new rows into reserve (:class:`salient_ds.adapters.growing.GrowingLinear`). Growth is
    permanent.

    Differs from the reference: in the released code, every process grows by its own scores (different matrices under
    data parallelism), only the last micro-batch counts, fp16's loss scale stays in the scores, and the sum of ranks may
    overshoot the target (``ties``).

    Rows that join late start their own warm-up (``lr_restart``), and rows that have not joined yet keep their values.
    For both, the optimizer's changes are rescaled (:class:`salient_ds.methods.increlora.row_rates.RowRates`).

    Rows need not all be allocated from the start: :meth:`room_for` says what an event needs. Rows are activated in
    order, so everything that is remembered about them is independent of how many are allocated.

    Raises:
        ValueError: the schedule misses the target or contradicts itself (see ``growth.py``).
    """

    name = "increlora"
    needs_penalty = False

    def __init__(
        self, config: IncreLoRAConfig, layout: RankLayout, total_steps: int, rates: RatePlan | None = None
    ) -> None:
        assert rates is not None or not config.lr_restart, "restarts need to know the learning-rate schedule"
        self.config = config
        self.layout = layout
        self.rates = rates
        self.plan = config.plan(layout, total_steps)
        self.events: Sequence[Event] = config.events(layout, total_steps)
        self.policy = MaskPolicy(
            gate_forward=True,
            zero_vectors=False,
            zero_moments=False,
            start_rank=config.start_rank,
            start_sigma=RESERVE_SIGMA if config.advance_learning else None,
        )
        self.exact_scores = config.score_reduction == "exact"
        """Final once :meth:`choose_reduction` has been called."""
        self._keeps_waiting_rows = rates is not None and rates.weight_decay > 0
        self.needs_before = config.lr_restart or self._keeps_waiting_rows
        self._reserve = self.plan.add if config.advance_learning else 0
        self._smoothed = sensitivity.init([torch.zeros(len(layout.ranks))])
        self._total = self.plan.initial_total
        self._step = 0
        start, reserve = config.start_rank, self._reserve if self.events else 0
        self._sigma_joined = [[0] * start + [NEVER] * (rank - start) for rank in layout.ranks]
        """By matrix and row: step after which E began to train. Includes rows that are not allocated yet."""
        self._vectors_joined = [([0] * (start + reserve) + [NEVER] * rank)[:rank] for rank in layout.ranks]
        """The same for the vectors, which already train in reserve."""
        self._row_rates = RowRates()
        self._choose_rows()

    @property
    def smoothed_M2(self) -> Tensor:
        """Ibar and Ubar of every matrix (M, 2)."""
        return torch.stack([self._smoothed.sensitivity[0], self._smoothed.uncertainty[0]], 1)

    def choose_reduction(self, accumulation: int) -> None:
        """Set ``exact_scores`` for ``accumulation`` micro-batches per step and process. Raises like the options do."""
        self.exact_scores = self.config.exact_scores(accumulation)

    def attach(self, layout: RankLayout, views: Sequence[StepView]) -> None:
        """Nothing to prepare: the statistic belongs to whole matrices."""
        assert layout == self.layout

    def resized(self, layout: RankLayout) -> None:
        """Continue with other numbers of allocated rows."""
        self.layout = layout
        self._choose_rows()

    def room_for(self, event: Event, previous: RankDecision) -> tuple[int, ...] | None:
        """Rows that every matrix needs before ``event`` is decided; None: the allocated ones suffice.

        Raises:
            ValueError: a score is not finite.
        """
        if previous.total >= self.plan.target_total:
            return None
        grown, _ = self._grow(previous, event)
        reserve = 0 if sum(grown) >= self.plan.target_total else self._reserve
        return more_room(self.plan, grown, reserve, self.layout.ranks)

    def scored_at(self, step: int) -> bool:
        """Whether to score the backward passes of ``step``: every ``score_every`` steps until growth ends."""
        growing = bool(self.events) and step <= self.events[-1].step and self._total < self.plan.target_total
        return growing and (step - 1) % self.config.score_every == 0

    def take_scores(self, score_M: Tensor, step: int) -> None:
        """Smooth the scores of an applied step, which are equal on every process."""
        assert self.scored_at(step)
        score_M = score_M.float().cpu()
        ones_M = torch.ones_like(score_M)
        sensitivity.update(self._smoothed, [score_M], [ones_M], self.config.beta1, self.config.beta2)

    def before(self, view: StepView, step: int) -> None:
        """Copy the rows that do not follow the optimizer's learning rate."""
        self._row_rates.keep(view)

    def observe(self, view: StepView, step: int) -> None:
        """Rescale the step of those rows to their own learning rate."""
        if not self.needs_before:
            return
        rates = self.rates
        assert rates is not None
        self._row_rates.rescale(view, lambda joined: 0.0 if joined == NEVER else rates.restart(step, joined))

    def end_step(self, step: int, penalty_M2: Tensor | None) -> None:
        """Count the step."""
        self._step = step

    def contribution(self) -> dict[str, Tensor]:
        """Nothing to sum: scores are already global when they arrive."""
        return {}

    def allocate(self, statistics: dict[str, Tensor], event: Event, previous: RankDecision) -> RankDecision:
        """Activate rows of the matrices with the highest scores. Returns ``previous`` itself if growth has ended.

        Raises:
            ValueError: a score is not finite.
        """
        if previous.total >= self.plan.target_total:
            return previous
        grown, threshold = self._grow(previous, event)
        assert all(rank <= R for R, rank in zip(self.layout.ranks, grown, strict=True)), "room is made before the event"
        self._total = sum(grown)
        final = self._total >= self.plan.target_total
        self._join(event.step, previous.ranks(self.layout), grown, 0 if final else self._reserve)
        mask_N = torch.cat([torch.arange(R) < rank for R, rank in zip(self.layout.ranks, grown, strict=True)])
        return RankDecision(event.step, event.total_rank, mask_N, threshold, hold=final)

    def local_state(self) -> Iterator[tuple[str, Part, Tensor]]:
        """Nothing is sharded."""
        return iter(())

    def shared_state(self) -> dict[str, Any]:
        """Smoothed scores, sum of ranks, and the step since which every row has been training."""
        return {
            "step": self._step,
            "total": self._total,
            "smoothed_M2": self.smoothed_M2.tolist(),
            "sigma_joined": [list(rows) for rows in self._sigma_joined],
            "vectors_joined": [list(rows) for rows in self._vectors_joined],
        }

    def load_state(self, shared: dict[str, Any], read: ReadShard) -> None:
        """Continue as if there had been no interruption."""
        self._step, self._total = int(shared["step"]), int(shared["total"])
        self._smoothed = Smoothed(*([column] for column in torch.tensor(shared["smoothed_M2"]).unbind(1)))
        self._sigma_joined = [list(rows) for rows in shared["sigma_joined"]]
        self._vectors_joined = [list(rows) for rows in shared["vectors_joined"]]
        self._choose_rows()

    def _grow(self, previous: RankDecision, event: Event) -> tuple[list[int], float]:
        """Rank of every matrix after ``event``, and the lowest score of one that grows."""
        smoothed_M2 = self.smoothed_M2
        bad = (~smoothed_M2.isfinite().all(1)).nonzero().flatten().tolist()
        refuse_non_finite("scores", self.layout.modules, bad, f"at step {event.step}")
        ranks = previous.ranks(self.layout)
        growth = self._growth(smoothed_M2.prod(1).tolist(), ranks, self.plan.target_total - previous.total)
        return [rank + rows for rank, rows in zip(ranks, growth.rows, strict=True)], growth.threshold

    def _growth(self, score_M: list[float], ranks: list[int], left: int) -> Growth:
        if self.plan.exact:
            room_M = [most - rank for most, rank in zip(self.plan.ranks, ranks, strict=True)]
            return grow_exact(score_M, room_M, min(left, self.plan.top_h * self.plan.add), self.plan.add)
        return grow_threshold(score_M, min(left, self.plan.top_h), self.plan.add)

    def _join(self, step: int, before: list[int], after: list[int], reserve: int) -> None:
        """Record that activated rows, and new rows in reserve, train from the next step on."""
        for k, (low, high) in enumerate(zip(before, after, strict=True)):
            self._sigma_joined[k][low:high] = [step] * (high - low)
            vectors = self._vectors_joined[k]
            for row in range(low, min(high + reserve, len(vectors))):
                if vectors[row] == NEVER:
                    vectors[row] = step
        self._choose_rows()

    def _choose_rows(self) -> None:
        """Choose the rows that do not follow the optimizer's rate: late ones, and waiting ones if they would decay."""
        chosen = {}
        for k in range(len(self.layout.ranks)):
            for factor, joined in (("A", self._vectors_joined), ("B", self._vectors_joined), ("E", self._sigma_joined)):
                wait = factor != "E" and self._keeps_waiting_rows
                there = joined[k][: self.layout.ranks[k]]
                runs = [run for run in runs_of(there) if (wait if run.joined == NEVER else self.config.lr_restart)]
                if runs:
                    chosen[k, factor] = runs
        self._row_rates.choose(chosen)
