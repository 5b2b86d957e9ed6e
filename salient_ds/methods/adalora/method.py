"""AdaLoRA (Zhang et al., ICLR 2023): ranks follow the smoothed sensitivity of triplets, under a shrinking budget.

Shape legend: N = singular values, R = ranks of one matrix, n = elements of one part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from salient_ds.methods.adalora.options import SensitivityConfig
from salient_ds.methods.base import modules_of_rows, refuse_non_finite
from salient_ds.methods.budget_rule import BudgetRule
from salient_ds.ranks import (
    Event,
    JoiningView,
    MaskPolicy,
    Part,
    RankDecision,
    RankLayout,
    ReadShard,
    StepView,
    neighbours,
)
from salient_ds.salience import sensitivity
from salient_ds.salience.select import reference_threshold, score_at_cut, select_threshold
from salient_ds.salience.sensitivity import Smoothed


class AdaLoRA:
    """Smooths |weight * gradient| of A, E and B at every step. Events zero the singular values with the lowest scores.

    A triplet is a singular value with its two vectors. The score of triplet i is s(E_i) + mean_j s(A_ij) +
    mean_j s(B_ji) with s = Ibar Ubar (Eq. 7 to 11). It uses means so that long and short vectors count alike. A zeroed
    singular value keeps its vectors and continues to train, so a later event may keep it again. What the last event
    zeroes stays zero.

    Every process smooths the elements it owns. An event sums N float64 numbers over the processes; other steps
    communicate nothing. Until the last event, the state takes twice the memory of the observed fp32 masters.
    ``score: gate_fisher`` observes E alone and smooths (weight * gradient)^2.

    Where paper and released code disagree, :class:`SensitivityOptions` decides. Differs from both: if the target is
    the initial total, there is no event and no statistic (LoRA in SVD form). The released code fails in that case.

    Raises:
        ValueError: the schedule has no event or contradicts itself (see :mod:`salient_ds.salience.cubic_budget`).
    """

    name = "adalora"
    factors: tuple[str, ...] = ("A", "E", "B")
    policy = MaskPolicy(gate_forward=False, zero_vectors=False, zero_moments=False)
    needs_penalty = False

    def __init__(self, config: SensitivityConfig, layout: RankLayout, total_steps: int) -> None:
        self.config = config
        self.layout = layout
        self.options = config.options()
        self._rule = BudgetRule(config, layout)
        self.events: Sequence[Event] = config.events(layout, total_steps)
        self.needs_before = self.options.moment == "paper"
        self._views: list[StepView] = []
        self.fused = False
        """Update the statistics with one kernel on CUDA devices; the engine sets it (``speed.fused_statistics``)."""
        self._state: dict[str, Smoothed] = {}
        self._joined: dict[str, list[tuple[Part, ...]]] = {}
        self._step = 0

    @property
    def state_bytes(self) -> int:
        """Bytes of the statistics on this process."""
        return sum(state.nbytes for state in self._state.values())

    def attach(self, layout: RankLayout, views: Sequence[StepView]) -> None:
        """Remember the views of this process."""
        assert layout == self.layout
        self._views = list(views)
        self._joined.clear()

    def resized(self, layout: RankLayout) -> None:
        """Continue with the rows that the last event kept. Statistics are no longer needed."""
        self.layout = layout
        self._state.clear()

    def before(self, view: StepView, step: int) -> None:
        """``moment: paper``: sensitivity of the weights at which the gradient was taken."""
        if self.options.moment == "paper":
            self._take_in(view, step)

    def observe(self, view: StepView, step: int) -> None:
        """``moment: reference``: sensitivity from the weights after the step, times the step's gradient."""
        if self.options.moment == "reference":
            self._take_in(view, step)

    def end_step(self, step: int, penalty_M2: Tensor | None) -> None:
        """Count the step. The statistics are freed once no event needs them."""
        self._step = step
        if not self.events or step > self.events[-1].step:
            self._state.clear()

    def contribution(self) -> dict[str, Tensor]:
        """``score``: this process's share of all scores (N,) float64. The sum over processes is exact to rounding."""
        score_N = torch.zeros(self.layout.total, dtype=torch.float64)
        for view in self._views:
            assert view.key in self._state, f"view {view.key} was not observed"
            for part, share_R in sensitivity.row_scores(self._state[view.key], self._spans(view)):
                first = self.layout.offsets[part.module]
                score_N = score_N.to(share_R.device)
                score_N[first : first + len(share_R)] += share_R
        return {"score": score_N}

    def allocate(self, statistics: dict[str, Tensor], event: Event, previous: RankDecision) -> RankDecision:
        """Keep the ``event.total_rank`` highest scores among all values, including those that the last event zeroed.

        Raises:
            ValueError: a score is not finite.
        """
        # Rounded, so that scores that differ only by the order of summation are equal on any sharding.
        score_N = statistics["score"].float()
        bad = modules_of_rows(self.layout, ~score_N.isfinite())
        refuse_non_finite("sensitivity scores", self.layout.modules, bad, f"at step {event.step}")
        score_N = self._rule.per_parameter(score_N, self.layout)
        everyone_N = torch.ones_like(score_N, dtype=torch.bool)
        if self.options.ties == "exact":
            mask_N = self._rule.select(score_N, event, everyone_N, self.layout)
            threshold = score_at_cut(score_N, mask_N, everyone_N)
        else:
            mask_N = select_threshold(score_N, event.total_rank)
            threshold = reference_threshold(score_N, event.total_rank)
        hold = event == self.events[-1]
        return RankDecision(event.step, event.total_rank, mask_N.cpu(), threshold, hold)

    def local_state(self) -> Iterator[tuple[str, Part, Tensor]]:
        """("sensitivity" or "uncertainty", part, values (n,)) for everything observed; nothing after the last event."""
        for view in self._views if self._pending(self._step) else []:
            state = self._state.get(view.key)
            if state is not None:
                for part, sensitivity_n, uncertainty_n in sensitivity.by_part(state, self._spans(view)):
                    yield "sensitivity", part, sensitivity_n
                    yield "uncertainty", part, uncertainty_n

    def shared_state(self) -> dict[str, Any]:
        """Last step seen, and whether the checkpoint of that step holds statistics."""
        return {"step": self._step, "saved": self._step > 0 and self._pending(self._step)}

    def load_state(self, shared: dict[str, Any], read: ReadShard) -> None:
        """Continue smoothing, whichever process owned the elements before.

        Raises:
            ValueError: this run has events left, but the state was saved after the last event of its schedule.
        """
        step = int(shared["step"])
        needed = step > 0 and self._pending(step)
        if needed and not shared["saved"]:
            raise ValueError(
                f"the checkpoint of step {step} was saved after the last allocation of its schedule and holds no "
                f"statistics, but this run's schedule has events up to step {self.events[-1].step}: resume with the "
                "warm-ups, target and number of steps it was saved with"
            )
        self._step = step
        self._state = {view.key: self._read(view, read) for view in self._views} if needed else {}

    def _read(self, view: StepView, read: ReadShard) -> Smoothed:
        spans = self._spans(view)
        devices = [view.value(span[0]).device for span in spans]
        sensitivity_, uncertainty_ = (
            [torch.cat([read(name, p) for p in span]).to(device) for span, device in zip(spans, devices, strict=True)]
            for name in ("sensitivity", "uncertainty")
        )
        return Smoothed(sensitivity_, uncertainty_)

    def _take_in(self, view: StepView, step: int) -> None:
        if not self.events or step > self.events[-1].window:
            return  # the scores are frozen in the final phase
        spans = self._spans(view)
        if isinstance(view, JoiningView):
            values, grads = [view.span_value(span) for span in spans], [view.span_grad(span) for span in spans]
        else:
            values, grads = ([get(part) for (part,) in spans] for get in (view.value, view.grad))
        state = self._state.get(view.key) or sensitivity.init(values)
        if self.config.score == "gate_fisher":
            self._state[view.key] = sensitivity.update_squares(state, values, grads, self.config.beta1)
        else:
            betas = self.config.beta1, self.config.beta2
            self._state[view.key] = sensitivity.update(state, values, grads, *betas, fused=self.fused)

    def _spans(self, view: StepView) -> list[tuple[Part, ...]]:
        """The observed parts of a view; those that lie side by side are together."""
        if view.key not in self._joined:
            factors = ("E",) if self.config.score == "gate_fisher" else self.factors
            parts = [part for part in view.parts if part.factor in factors]
            self._joined[view.key] = neighbours(view, parts)
        return self._joined[view.key]

    def _pending(self, step: int) -> bool:
        """Whether an event comes after ``step``."""
        return bool(self.events) and step < self.events[-1].step
