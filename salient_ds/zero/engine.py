"""A DeepSpeed engine that decides ranks while it trains."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.methods.base import Method, RankDecision, RankLayout, ScoringMethod, SharingMethod, initial_decision
from salient_ds.salience.budget import Event
from salient_ds.zero.collectives import all_equal, average, packed_sum, share_of_work, world
from salient_ds.zero.compact import Resizer
from salient_ds.zero.layouts import loss_scale
from salient_ds.zero.loss_check import LossCheck
from salient_ds.zero.probe_events import ProbeEvents
from salient_ds.zero.reports import EventReport, InForce, MicroBatch, NonFiniteLoss, StepReport
from salient_ds.zero.shards import LocalView, ShardMap


class AllocatingEngine:
    """Wraps a DeepSpeed engine and a :class:`Method`.

    Observation and masking happen in the step post hook of the *basic* torch optimizer: it sees the new fp32 master and
    the averaged, unscaled, clipped gradient as local slices, before the low-precision copy and the all-gather, and it
    does not fire for skipped steps. So a value zeroed there is zero in master, copy and on every process for free.
    """

    def __init__(
        self,
        engine: Any,
        adapted: AdaptedModel,
        method: Method,
        device: torch.device,
        *,
        resizer: Resizer | None = None,
        initial_layout: RankLayout | None = None,
        kept_N: Tensor | None = None,
    ) -> None:
        """
        Args:
            engine: from ``deepspeed.initialize`` over ``adapted.model``.
            resizer: drops pruned rows and makes room for new ones; None: rows stay as they are, masked.
            initial_layout, kept_N: the layout of all rows that there may be, if ``adapted`` has only some of them,
                and which (bool, CPU).
        """
        self.initial_layout = initial_layout or adapted.layout
        self.adapted = adapted
        self.method = method
        self.device = device
        self.resizer = resizer
        self.step = 0
        """Applied optimizer steps so far (DeepSpeed's global_steps also counts skipped ones)."""
        if isinstance(method, ScoringMethod):
            method.choose_reduction(engine.gradient_accumulation_steps())
        if isinstance(method, SharingMethod) and world()[1] > 1:
            method.share = share_of_work()
        self._events = {event.step: event for event in method.events}
        self.probes = ProbeEvents(self)
        """Events before a step, of methods that have them."""
        initial = initial_decision(method.policy, adapted.layout)
        if not bool(initial.mask_N.all()):
            adapted.set_mask(initial.mask_N, method.policy.gate_forward, initial.hold)
        self.adopt(engine, initial, initial.mask_N.new_ones(adapted.layout.total) if kept_N is None else kept_N)

    def adopt(self, engine: Any, decision: RankDecision, kept_N: Tensor) -> None:
        """Go on with ``engine``: the first one, or one with other rows.

        Args:
            decision: what is in force for the rows there are now.
            kept_N: which rows of the initial layout they are (bool, CPU).
        """
        self.engine = engine
        self.shards = ShardMap(engine, self.adapted)
        self.kept_N = kept_N
        self.in_force = InForce(decision, decision)
        self._hold = self._held_at_zero(decision)
        self.method.attach(self.adapted.layout, list(self.shards.views.values()))
        if self.method.needs_before:
            engine.basic_optimizer.register_step_pre_hook(self._before_optimizer)
        engine.basic_optimizer.register_step_post_hook(self._after_optimizer)

    def in_initial_rows(self, mask_n: Tensor) -> Tensor:
        """A mask over the rows there are now as one over those of the initial layout (bool, CPU)."""
        mask_N = self.kept_N.clone()
        mask_N[self.kept_N] = mask_n
        return mask_N

    def forget(self) -> None:
        """Let go of the engine and of every view of its buffers; :meth:`adopt` comes next."""
        self.method.attach(self.adapted.layout, [])
        self._hold.clear()
        del self.engine, self.shards

    # The order of one step, as a table of contents.
    def train_step(self, micro_batches: Iterable[MicroBatch], global_targets: int) -> StepReport:
        """One optimizer step over ``micro_batches`` of this process.

        Args:
            micro_batches: exactly ``gradient_accumulation_steps`` of them.
            global_targets: targets in the whole global batch: every target weighs the same on any number of processes.

        Raises:
            NonFiniteLoss: on all processes, before parameters changed.
        """
        batches = list(micro_batches)
        assert len(batches) == self.engine.gradient_accumulation_steps(), "one micro-batch per accumulation step"
        self.probes.take_due()
        loss = self._forward_backward(batches, global_targets)
        self.engine.step()
        skipped = not self.engine.was_step_applied()
        report = StepReport(loss, skipped, self.engine.get_global_grad_norm())
        penalty = self._end_penalty()
        scores = self._end_scores()
        if not skipped:
            self.step += 1
            self._settle_pending()
            if scores is not None and isinstance(self.method, ScoringMethod):
                average(scores)
                self.method.take_scores(scores, self.step)
            self.method.end_step(self.step, None if penalty is None else penalty.norms_M2)
            event = self._events.get(self.step)
            report.event = self._allocate(event) if event is not None else self.probes.reported()
            report.compaction = None if self.resizer is None else self.resizer.after_step(self)
        if penalty is not None:
            report.penalty_value = penalty.value()
        return report

    def _forward_backward(self, batches: list[MicroBatch], global_targets: int) -> float:
        scale = world()[1] * len(batches) / max(global_targets, 1)
        check = LossCheck(self.device, global_targets)
        if not self.adapted.model.training:
            self.engine.train()  # visits every module: milliseconds of the host's time
        self._arm_scores()
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            if last:
                self._arm_penalty()
            loss = self.engine(**batch.inputs).loss
            # a micro-batch without any target has a mean of 0/0: it contributes nothing but keeps the graph whole
            weighted = loss * (batch.num_targets * scale) if batch.num_targets else loss.nan_to_num() * 0.0
            check.add(loss, batch.num_targets)
            if last:
                check.start()
            self.engine.backward(weighted)
            if not last:
                self.engine.step()
        verdict = check.finish()
        if verdict.broken:
            self._end_penalty()
            self._end_scores()
            raise NonFiniteLoss(self.step + 1, self._gather_indices(batches if verdict.broken_here else []))
        return verdict.loss

    def _gather_indices(self, batches: list[MicroBatch]) -> list[int]:
        mine = [i for batch in batches for i in batch.indices]
        everyone: list[Any] = [mine]
        if world()[1] > 1:
            everyone = [None] * world()[1]
            torch.distributed.all_gather_object(everyone, mine)
        return sorted(i for part in everyone for i in part)

    def _arm_penalty(self) -> None:
        penalty = self.adapted.penalty
        if penalty is not None and (penalty.coefficient > 0 or self.method.needs_penalty):
            penalty.arm(loss_scale(self.engine), self.device)

    def _end_penalty(self) -> Any:
        penalty = self.adapted.penalty
        if penalty is None or not penalty.armed:
            return None
        penalty.disarm()
        return penalty

    def _arm_scores(self) -> None:
        """Score all micro-batches of this step, if the method asks for it."""
        scores, method = self.adapted.scores, self.method
        if scores is not None and isinstance(method, ScoringMethod) and method.scored_at(self.step + 1):
            several = method.exact_scores and world()[1] > 1
            scores.arm(loss_scale(self.engine), self.device, average if several else None)

    def _end_scores(self) -> Tensor | None:
        """Scores of this process (M,) float64, summed over its micro-batches; None for a step without."""
        scores = self.adapted.scores
        if scores is None or not scores.armed:
            return None
        scores.disarm()
        return scores.score_M

    @torch.no_grad()
    def _before_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for _, view in self._stepped_views(optimizer):
            self.method.before(view, self.step + 1)

    @torch.no_grad()
    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.in_force.pending:
            self._set_hold(self.in_force.pending[0])
        for index, view in self._stepped_views(optimizer):
            for piece, drop in zip(view.sigma_slices(), self._hold.get(index, []), strict=False):
                piece.masked_fill_(drop, 0)
            self.method.observe(view, self.step + 1)

    def _stepped_views(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, LocalView]]:
        """Views whose buffer the optimizer steps right now (with sub-groups it steps one buffer at a time)."""
        stepped = {id(t) for group in optimizer.param_groups for t in group["params"]}
        for index, view in self.shards.views.items():
            if id(self.shards.layout.buffers[index]) in stepped:
                yield index, view

    def _set_hold(self, decision: RankDecision) -> None:
        """From now on the rows that ``decision`` drops are zeroed after every optimizer step (if it holds them)."""
        if decision is self.in_force.held:
            return
        self.in_force.held = decision
        self._hold = self._held_at_zero(decision)

    def _held_at_zero(self, decision: RankDecision) -> dict[int, list[Tensor]]:
        """By view: which of its singular values ``decision`` wants to be zero (empty: none)."""
        dropped_N = ~decision.mask_N if decision.hold else torch.zeros_like(decision.mask_N)
        return {i: _by_run(view, dropped_N) for i, view in self.shards.views.items()}

    def _allocate(self, event: Event) -> EventReport | None:
        """Decide and apply; None if the method had reached its target before."""
        growth = None if self.resizer is None else self.resizer.before_event(self, event)
        t0 = time.perf_counter()
        contribute = not self.shards.replicated or world()[0] == 0
        statistics = packed_sum(self.method.contribution(), contribute, self.device)
        t1 = time.perf_counter()
        decision = self.method.allocate(statistics, event, self.in_force.latest)
        if not all_equal(decision.digest(), self.device):
            raise RuntimeError(
                f"processes disagree on the allocation of step {event.step} (digest {decision.digest()[:12]} here): "
                "their statistics or hardware differ; nothing was applied, resume from the last checkpoint"
            )
        if decision is self.in_force.latest:
            return None
        t2 = time.perf_counter()
        changed = int((decision.mask_N != self.in_force.latest.mask_N).sum())
        previous, self.in_force.latest = self.in_force.latest, decision
        if self.method.policy.delay:
            self.in_force.pending.append(decision)
        else:
            self.apply(decision)
            self._start_rows(decision.mask_N & ~previous.mask_N)
        ranks, kept_N = tuple(decision.ranks(self.adapted.layout)), self.in_initial_rows(decision.mask_N)
        return EventReport(decision, event, t1 - t0, t2 - t1, time.perf_counter() - t2, changed, ranks, kept_N, growth)

    def _settle_pending(self) -> None:
        if self.in_force.pending:
            self.apply(self.in_force.pending.pop(0))

    def finish(self) -> None:
        """After the last step: a decision that still waits for its next step takes effect now."""
        self._settle_pending()

    @torch.no_grad()
    def apply(self, decision: RankDecision) -> None:
        """Bring masks, masters, copies and moments in line with ``decision``; purely local."""
        policy = self.method.policy
        self._set_hold(decision)
        self.adapted.set_mask(decision.mask_N, policy.gate_forward, decision.hold)
        if not decision.hold and decision.step < self.step:
            return  # taken up again from a checkpoint: what has grown back since the event stays
        ranks = list(self.adapted.layout.ranks)
        prunes = [not bool(mask_R.all()) for mask_R in decision.mask_N.split(ranks)]
        drops = (~decision.mask_N).to(self.device).split(ranks)  # one copy to the device for all matrices
        for owned in self.shards.owned.values():
            if prunes[owned.module] and (owned.factor == "E" or policy.zero_vectors):
                self.shards.zero_rows(owned, drops[owned.module], policy.zero_moments)

    @torch.no_grad()
    def _start_rows(self, new_N: Tensor) -> None:
        """Give E of rows that an event has switched on its first value, if the method has one for them."""
        value = self.method.policy.start_sigma
        if value is None:
            return
        news = new_N.split(list(self.adapted.layout.ranks))
        for owned in self.shards.owned.values():
            if owned.factor == "E" and bool(news[owned.module].any()):
                self.shards.write_rows(owned, news[owned.module], value, zero_moments=True)


def _by_run(view: LocalView, dropped_N: Tensor) -> list[Tensor]:
    dropped_n = dropped_N[view.rows_n.cpu()].to(view.rows_n.device)
    if not bool(dropped_n.any()):
        return []
    return list(dropped_n.split([s.numel() for s in view.sigma_slices()]))
