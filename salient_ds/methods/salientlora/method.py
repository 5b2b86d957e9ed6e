"""SalientLoRA (Ke et al., NeurIPS 2024): ranks decided from histories and dependencies of singular values.

Shape legend: N = singular values, L = those that are ranked, M = adapted matrices, T = window length, t = steps
recorded, n = elements of one part.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from salient_ds.methods.base import modules_of_rows, refuse_non_finite
from salient_ds.methods.budget_rule import BudgetRule
from salient_ds.methods.salientlora.options import SalientLoRAConfig, SalientOptions
from salient_ds.ranks import Event, MaskPolicy, Part, RankDecision, RankLayout, ReadShard, StepView, WorkShare
from salient_ds.salience import score
from salient_ds.salience.budget import leading_losses
from salient_ds.salience.influence import REFERENCE_EPSILON, influence
from salient_ds.salience.select import reference_threshold, score_at_cut, select_threshold
from salient_ds.salience.trajectory import Trajectory


class SalientLoRA:
    """Records E and the orthogonality losses during each window, and prunes to the budget at its end.

    Where paper and released code disagree, :class:`SalientOptions` decides. ``nan_scores: reference`` also selects
    the released code's numerics: float32 scores, epsilon 1e-15 in correlations, pruned rows ranked with the others.

    Raises:
        ValueError: the schedule has no event or contradicts itself (see :mod:`salient_ds.salience.budget`).
    """

    name = "salientlora"
    needs_penalty = True
    needs_before = False

    def __init__(self, config: SalientLoRAConfig, layout: RankLayout, total_steps: int) -> None:
        self.config = config
        self.layout = layout
        self.options: SalientOptions = config.options()
        self._rule = BudgetRule(config, layout)
        self.policy = mask_policy(self.options)
        self.events: Sequence[Event] = config.events(layout, total_steps)
        self._event_steps = [event.step for event in self.events]
        warmup = config.plan(layout, total_steps).initial_warmup
        self._leading_losses = leading_losses(self.options.schedule, warmup)
        self.share: WorkShare | None = None
        """How the work of an event is divided over processes; set by the engine."""
        self._views: list[StepView] = []
        self._step = 0
        self._device = torch.device("cpu")
        self._trajectory = Trajectory()
        self._losses: list[Tensor] = []
        self._window_of: Event | None = None

    @property
    def reference_numerics(self) -> bool:
        """Whether rounding, epsilon and NaN follow the released code."""
        return self.options.nan_scores == "reference"

    @property
    def window_bytes(self) -> int:
        """Bytes of the recorded window on this process."""
        return self._trajectory.nbytes

    def attach(self, layout: RankLayout, views: Sequence[StepView]) -> None:
        """Remember the views of this process."""
        assert layout == self.layout
        self._views = list(views)

    def resized(self, layout: RankLayout) -> None:
        """Continue with the rows that the last event kept. Its window is over."""
        self.layout = layout
        self._trajectory.clear()

    def before(self, view: StepView, step: int) -> None:
        """Nothing to observe: the window holds values after the step."""

    def observe(self, view: StepView, step: int) -> None:
        """Record the view's singular values if ``step`` lies in a window; for gate_fisher, times their gradients."""
        event = self._enter(step)
        if event is None or step < event.window_start:
            return
        rows_n, values_n = view.sigma()
        if self.config.score == "gate_fisher":
            values_n = values_n * view.sigma_grad()
        self._device = values_n.device
        self._trajectory.append(view.key, rows_n, values_n, event.window)

    def end_step(self, step: int, penalty_M2: Tensor | None) -> None:
        """Record the orthogonality norms of the step."""
        event = self._enter(step)
        self._step = step
        if event is None or step < self._first_loss(event):
            return
        assert penalty_M2 is not None, "SalientLoRA needs the orthogonality norms of every step"
        self._losses.append(penalty_M2.detach().float().clone())

    def contribution(self) -> dict[str, Tensor]:
        """``window``: this process's rows of the finished window (N, T), with zeros elsewhere."""
        event = self._window_of
        assert event is not None and event.step == self._step, "only due right after an event's step"
        return {"window": self._trajectory.assemble(self.layout.total, event.window, self._device)}

    def allocate(self, statistics: dict[str, Tensor], event: Event, previous: RankDecision) -> RankDecision:
        """Score all values of the window and keep ``event.total_rank`` of them.

        The history of orthogonality norms is not part of ``statistics``: every process has recorded the same one.

        Raises:
            ValueError: a singular value is not finite.
        """
        assert event == self._window_of, f"the window belongs to {self._window_of}, not to {event}"
        window_NT = statistics["window"]
        assert window_NT.shape == (self.layout.total, event.window)
        live_N = previous.mask_N.to(window_NT.device)
        bad = modules_of_rows(self.layout, ~window_NT.isfinite().all(1))
        when = f"in steps {event.window_start}..{event.step}"
        refuse_non_finite("singular values", self.layout.modules, bad, when)
        # Whatever the optimizer did to pruned values since the last event does not count.
        window_NT = window_NT * live_N[:, None]
        if self.reference_numerics:
            score_N = self._scores(window_NT, list(self.layout.ranks))
        else:
            score_N = torch.full(live_N.shape, float("-inf"), dtype=torch.float64, device=window_NT.device)
            score_N[live_N] = self._scores(window_NT[live_N], previous.ranks(self.layout), live_N)
        mask_N, threshold = self._select(score_N, live_N, event)
        return RankDecision(event.step, event.total_rank, mask_N.cpu(), threshold)

    def local_state(self) -> Iterator[tuple[str, Part, Tensor]]:
        """The unfinished window, as ("window", part of E, values (t, n)) triples."""
        for view in self._views if self._recording() else []:
            for part in _sigma_parts(view):
                history_tn = self._trajectory.history(view.key, self._rows(part))
                if history_tn is not None:
                    yield "window", part, history_tn

    def shared_state(self) -> dict[str, Any]:
        """Last step seen, number of steps in the unfinished window, and their orthogonality norms (t, M, 2)."""
        losses = self._losses if self._recording() else []
        empty_0M2 = torch.empty((0, len(self.layout.ranks), 2))
        return {
            "step": self._step,
            "recorded": self._recorded_at(self._step),
            "losses_tM2": torch.stack(losses).cpu() if losses else empty_0M2,
        }

    def load_state(self, shared: dict[str, Any], read: ReadShard) -> None:
        """Continue in the middle of a window, whichever process owned its parts before.

        Raises:
            ValueError: the state was saved under a schedule with other windows.
        """
        step, recorded = int(shared["step"]), int(shared["recorded"])
        if recorded != self._recorded_at(step):
            raise ValueError(
                f"the checkpoint of step {step} holds {recorded} steps of an unfinished window, this run's "
                f"schedule would have {self._recorded_at(step)}: resume with the warm-ups, windows and number "
                "of steps it was saved with"
            )
        self._trajectory.clear()
        self._step = step
        self._window_of = self._event_at(step + 1)
        self._losses = [loss_M2.clone() for loss_M2 in shared["losses_tM2"]]
        if recorded:
            assert self._window_of is not None
            for view in self._views:
                self._restore_view(view, read, recorded, self._window_of.window)

    def _restore_view(self, view: StepView, read: ReadShard, recorded: int, window: int) -> None:
        parts = _sigma_parts(view)
        if not parts:
            return
        rows_n = torch.cat([self._rows(part) for part in parts])
        values_tn = torch.cat([read("window", part) for part in parts], 1)
        assert len(values_tn) == recorded
        self._trajectory.restore(view.key, rows_n, values_tn, window)

    def _scores(self, window_LT: Tensor, sizes: list[int], live_N: Tensor | None = None) -> Tensor:
        """Scores (L,) of the given rows. Matrix k owns ``sizes[k]`` of them; ``live_N``: which they are (None: all)."""
        if self.config.score == "gate_fisher":
            return self._rule.per_parameter(window_LT.double().square().mean(1), self.layout, live_N)
        options, reference = self.options, self.reference_numerics
        norms_TM2 = torch.stack(self._losses[: window_LT.shape[1]]).to(window_LT.device)
        norms_TM2 = norms_TM2.float() if reference else norms_TM2.double()
        losses_KT = score.orthogonality_losses(norms_TM2, options.loss_weights != "global")
        weights_KT = score.loss_weights(losses_KT, "nan" if reference else "uniform")
        if options.loss_weights == "normalised":
            weights_KT = weights_KT / weights_KT.mean(1, keepdim=True)
        magnitude_L = score.magnitude(window_LT, weights_KT, sizes, options.magnitude == "signed")
        # the gain is the square of a singular value
        magnitude_L = self._rule.per_parameter(magnitude_L, self.layout, live_N, power=0.5)
        influence_L = influence(
            window_LT,
            self.config.beta,
            self.config.gamma,
            options.leaf_influence,
            epsilon=REFERENCE_EPSILON if reference else 0.0,
            strict=options.edges == "strict",
            share=self.share,
        )
        terms = score.normalise(magnitude_L, influence_L, options.normalisation, sizes, "nan" if reference else "zero")
        return score.combine(*terms, options.combine, self.config.lambda_)

    def _select(self, score_N: Tensor, live_N: Tensor, event: Event) -> tuple[Tensor, float]:
        budget = event.total_rank
        if self.options.ties == "exact":
            mask_N = self._rule.select(score_N, event, live_N, self.layout)
            return mask_N, score_at_cut(score_N, mask_N, live_N)
        ranked_N = torch.ones_like(live_N) if self.reference_numerics else live_N
        mask_N = torch.zeros_like(live_N)
        mask_N[ranked_N] = select_threshold(score_N[ranked_N], budget)
        return mask_N, reference_threshold(score_N[ranked_N], budget)

    def _event_at(self, step: int) -> Event | None:
        """The event that ends the window which ``step`` belongs to or waits for; None after the last one."""
        index = bisect_left(self._event_steps, step)
        return self.events[index] if index < len(self.events) else None

    def _enter(self, step: int) -> Event | None:
        """The event that ``step`` leads to. Frees the window of an earlier event."""
        event = self._event_at(step)
        if event != self._window_of:
            self._trajectory.clear()
            self._losses.clear()
            self._window_of = event
        return event

    def _first_loss(self, event: Event) -> int:
        # The step before a later window is the previous event's, and so is its loss, as in the released code.
        return event.window_start - self._leading_losses

    def _recorded_at(self, step: int) -> int:
        """Number of steps of an unfinished window that are recorded once ``step`` has ended; 0 after an event."""
        event = self._event_at(step + 1)
        return max(0, step - event.window_start + 1) if event is not None else 0

    def _recording(self) -> bool:
        """Whether the recorded values belong to an open window, not to an event that has already taken place."""
        return self._window_of is not None and self._window_of.step > self._step

    def _rows(self, part: Part) -> Tensor:
        """Global row numbers of a part of E (n,)."""
        first = self.layout.offsets[part.module] + part.lo
        return torch.arange(first, first + part.numel)


def mask_policy(options: SalientOptions) -> MaskPolicy:
    """How decisions act: at once and on everything (paper), or one step later and only on E (released code)."""
    everything = options.pruned_vectors == "zero"
    return MaskPolicy(
        gate_forward=everything,
        zero_vectors=everything,
        zero_moments=everything,
        delay=0 if options.apply_at == "now" else 1,
    )


def _sigma_parts(view: StepView) -> list[Part]:
    return [part for part in view.parts if part.factor == "E"]
