"""A DeepSpeed engine that decides ranks while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.engine.compact import Resizer
from salient_ds.engine.decisions import Decisions
from salient_ds.engine.loss_check import LossCheck, StepLoss
from salient_ds.engine.reports import EventReport, MicroBatch, NonFiniteLoss, StepReport
from salient_ds.engine.shards import ShardMap
from salient_ds.engine.state import AllocationState
from salient_ds.methods.duties import Method, ScoringMethod, SharingMethod, SummingMethod
from salient_ds.ranks import Event, RankLayout
from salient_ds.zero.collectives import average, share_of_work, world
from salient_ds.zero.internals.engine_state import loss_scale


class BeforeStep(Protocol):
    """Allocation events that come before a step instead of after one (HeteroLoRA's probes)."""

    def take_due(self) -> None:
        """Take the event that is due before the next step, if there is one."""
        ...

    def reported(self) -> EventReport | None:
        """Return what was decided since the last applied step. The next call returns None."""
        ...


class InputNoise(Protocol):
    """Noise that is added to the inputs of training batches (:mod:`salient_ds.models.embedding_noise`)."""

    def during(self, step: int, rows: Sequence[int], inputs: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Add noise in the forward pass of one micro-batch of the step that is being taken."""
        ...


class AllocatingEngine:
    """Wraps a DeepSpeed engine and a :class:`Method`: one call trains a step and handles the event that is due."""

    def __init__(
        self,
        state: AllocationState,
        *,
        resizer: Resizer | None = None,
        before: BeforeStep | None = None,
        noise: InputNoise | None = None,
    ) -> None:
        """
        Args:
            state: rows, decisions and the DeepSpeed engine.
            resizer: drops pruned rows and makes room for new ones. None: the number of rows never changes, and pruned
                rows stay masked.
            before: events that come before a step, for methods that have them.
            noise: added to the inputs of training batches; None: nothing.
        """
        self.state = state
        self.resizer = resizer
        self.before = before
        self.noise = noise
        method = state.method
        if isinstance(method, ScoringMethod):
            method.choose_reduction(state.engine.gradient_accumulation_steps())
        if isinstance(method, SharingMethod) and world().world_size > 1:
            method.share = share_of_work()
        self._events = {event.step: event for event in method.events}
        self.flags: dict[str, Callable[[], bool]] = {}
        """Questions that every process answers for itself in every step, by name; the same names on all processes.
        :attr:`StepReport.raised` holds those that any process answered with yes. The answers travel with the loss."""
        self.phase = "reading rows"
        """What a step is doing, in words. Other threads may read it."""

    @property
    def step(self) -> int:
        """Applied optimizer steps so far."""
        return self.state.step

    @property
    def engine(self) -> Any:
        """The current DeepSpeed engine. Dropping or adding rows replaces it."""
        return self.state.engine

    @property
    def adapted(self) -> AdaptedModel:
        return self.state.adapted

    @property
    def method(self) -> Method:
        return self.state.method

    @property
    def device(self) -> torch.device:
        return self.state.device

    @property
    def shards(self) -> ShardMap:
        return self.state.shards

    @property
    def decisions(self) -> Decisions:
        return self.state.decisions

    @property
    def initial_layout(self) -> RankLayout:
        """The layout of all rows that may ever exist."""
        return self.state.initial_layout

    @property
    def kept_N(self) -> Tensor:
        """Which rows of the initial layout exist now (bool, CPU)."""
        return self.state.kept_N

    # Kept as a plain list of calls, so that it shows the order of one step.
    def train_step(self, micro_batches: Iterable[MicroBatch], global_targets: int) -> StepReport:
        """Take one optimizer step, and the allocation event that is due after it.

        Args:
            micro_batches: those of this process, exactly ``gradient_accumulation_steps`` of them.
            global_targets: number of targets in the whole global batch. The loss is normalised by it, so that every
                target weighs the same on any number of processes.

        Raises:
            NonFiniteLoss: on all processes, before any parameter changes.
        """
        batches = list(micro_batches)
        assert len(batches) == self.engine.gradient_accumulation_steps(), "one micro-batch per accumulation step"
        if self.before is not None:
            self.phase = "probing"
            self.state.may_change()
            self.before.take_due()
        self.phase = "forward and backward"
        verdict = self._forward_backward(batches, global_targets)
        self.phase = "reducing gradients and stepping"
        self.state.may_change()
        self.engine.step()
        skipped = not self.engine.was_step_applied()
        report = StepReport(verdict.loss, skipped, self.engine.get_global_grad_norm())
        report.raised = frozenset(name for name, up in zip(sorted(self.flags), verdict.flags, strict=True) if up)
        penalty = self._end_penalty()
        scores = self._end_scores()
        if not skipped:
            self.state.step += 1
            self.decisions.settle()
            if scores is not None and isinstance(self.method, ScoringMethod):
                average(scores)
                self.method.take_scores(scores, self.step)
            if isinstance(self.method, SummingMethod) and self.method.sums_at(self.step):
                self.method.take_sums(self.state.summed(self.method.step_contribution()), self.step)
            self.method.end_step(self.step, None if penalty is None else penalty.norms_M2)
            event = self._events.get(self.step)
            self.phase = "allocating ranks" if event is not None else "ending the step"
            if event is not None:
                report.event = self._allocate(event)
            elif self.before is not None:
                report.event = self.before.reported()
            report.compaction = None if self.resizer is None else self.resizer.after_step(self.state)
        if penalty is not None:
            report.penalty_value = penalty.value()
        self.phase = "reading rows"
        return report

    def _forward_backward(self, batches: list[MicroBatch], global_targets: int) -> StepLoss:
        scale = world().world_size * len(batches) / max(global_targets, 1)
        check = LossCheck(self.device, global_targets, [self.flags[name]() for name in sorted(self.flags)])
        if not self.adapted.model.training:
            self.engine.train()  # only when needed: it visits every module, which takes the host milliseconds
        self._arm_scores()
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            if last:
                self._arm_penalty()
            with self._noise(batch):
                loss = self.engine(**batch.inputs).loss
            # a micro-batch without targets has a mean loss of 0/0: count it as zero, but keep its graph for backward
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
        return verdict

    def _noise(self, batch: MicroBatch) -> AbstractContextManager[None]:
        if self.noise is None:
            return nullcontext()
        return self.noise.during(self.step + 1, batch.indices, batch.inputs)

    def _gather_indices(self, batches: list[MicroBatch]) -> list[int]:
        mine = [i for batch in batches for i in batch.indices]
        everyone: list[Any] = [mine]
        if world().world_size > 1:
            everyone = [None] * world().world_size
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
            several = method.exact_scores and world().world_size > 1
            scores.arm(loss_scale(self.engine), self.device, average if several else None)

    def _end_scores(self) -> Tensor | None:
        """Scores of this process (M,) float64, summed over its micro-batches; None if the step is not scored."""
        scores = self.adapted.scores
        if scores is None or not scores.armed:
            return None
        scores.disarm()
        return scores.score_M

    def _allocate(self, event: Event) -> EventReport | None:
        """Make room for the rows that the event adds, decide, apply. None if there was nothing to decide."""
        growth = None if self.resizer is None else self.resizer.before_event(self.state, event)
        report = self.state.allocate(event)
        return None if report is None else replace(report, growth=growth)

    def finish(self) -> None:
        """Call after the last step: a decision that still waits for a next step takes effect now."""
        self.state.may_change()
        self.decisions.settle()
