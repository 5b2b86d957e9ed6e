"""The state that allocation works on: rows, local shards and decisions, on top of the current engine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.engine.decisions import Decisions
from salient_ds.engine.reports import EventReport
from salient_ds.engine.rotation import rotate_adapters
from salient_ds.engine.shards import LocalView, ShardMap
from salient_ds.methods.duties import Method, RotatingMethod
from salient_ds.ranks import Event, RankDecision, RankLayout, initial_decision
from salient_ds.zero.collectives import all_equal, packed_sum, world
from salient_ds.zero.internals.engine_state import basic_optimizer


class Copying(Protocol):
    """A copy of tensors that is being taken by a thread."""

    taken: threading.Event
    """Set once the tensors may change."""


class AllocationState:
    """Rows, decisions and local shards of a run. Compaction, growth, probes and checkpoints work on it.

    Methods observe, and pruned values are zeroed, in the step post hook of the *basic* torch optimizer. That hook sees
    the new fp32 masters and the averaged, unscaled, clipped gradients as local slices. It runs before the low-precision
    copy and the all-gather, so a value that is zeroed there is zero in the master, in the copies and on every process
    at no extra cost. It does not fire for skipped steps.
    """

    def __init__(
        self,
        engine: Any,
        adapted: AdaptedModel,
        method: Method,
        device: torch.device,
        *,
        initial_layout: RankLayout | None = None,
        kept_N: Tensor | None = None,
    ) -> None:
        """
        Args:
            engine: from ``deepspeed.initialize`` over ``adapted.trained``.
            initial_layout: the layout of all rows that may ever exist (default: those of ``adapted``).
            kept_N: which rows of ``initial_layout`` the adapters have (bool, CPU; default: all).
        """
        self.initial_layout = initial_layout or adapted.layout
        self.adapted = adapted
        self.method = method
        self.device = device
        self.step = 0
        """Applied optimizer steps so far (DeepSpeed's global_steps also counts skipped ones)."""
        self.snapshot: Copying | None = None
        """A copy of the tensors that a checkpoint is being made of."""
        initial = initial_decision(method.policy, adapted.layout)
        if not bool(initial.mask_N.all()):
            adapted.set_mask(initial.mask_N, method.policy.gate_forward, initial.hold)
        self.adopt(engine, initial, initial.mask_N.new_ones(adapted.layout.total) if kept_N is None else kept_N)

    def adopt(self, engine: Any, decision: RankDecision, kept_N: Tensor) -> None:
        """Work with ``engine`` from now on: the first one, or the one after a resize.

        Args:
            decision: the decision in force, over the rows that exist now.
            kept_N: which rows of the initial layout exist now (bool, CPU).
        """
        self.engine = engine
        self.shards = ShardMap(engine, self.adapted)
        self.kept_N = kept_N
        self.decisions = Decisions(self.method.policy, self, decision, decision)
        self._zeroed: dict[int, list[Tensor]] = {}
        self.hold(decision)
        self.method.attach(self.adapted.layout, list(self.shards.views.values()))
        if self.method.needs_before:
            basic_optimizer(engine).register_step_pre_hook(self._before_optimizer)
        basic_optimizer(engine).register_step_post_hook(self._after_optimizer)

    def may_change(self) -> None:
        """Wait until masters, moments and statistics have been copied, if a checkpoint is being made of them."""
        if self.snapshot is not None:
            self.snapshot.taken.wait()
            self.snapshot = None

    def forget(self) -> None:
        """Drop all references to the engine and to views of its buffers. :meth:`adopt` must follow."""
        self.method.attach(self.adapted.layout, [])
        self._zeroed.clear()
        del self.engine, self.shards

    def in_initial_rows(self, mask_n: Tensor) -> Tensor:
        """Turn a mask over the rows that exist now into one over the rows of the initial layout (bool, CPU)."""
        mask_N = self.kept_N.clone()
        mask_N[self.kept_N] = mask_n
        return mask_N

    @torch.no_grad()
    def _before_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for _, view in self._stepped_views(optimizer):
            self.method.before(view, self.step + 1)

    @torch.no_grad()
    def _after_optimizer(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.decisions.before_observation()
        for index, view in self._stepped_views(optimizer):
            for piece, drop in zip(view.sigma_slices(), self._zeroed.get(index, []), strict=False):
                piece.masked_fill_(drop, 0)
            self.method.observe(view, self.step + 1)

    def _stepped_views(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[int, LocalView]]:
        """Views whose buffer the optimizer is stepping (with sub-groups it steps one buffer at a time)."""
        stepped = {id(t) for group in optimizer.param_groups for t in group["params"]}
        for index, view in self.shards.views.items():
            if id(self.shards.layout.buffers[index]) in stepped:
                yield index, view

    def summed(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum what the processes' methods contribute. Where nothing is partitioned, only the main process's counts."""
        return packed_sum(parts, not self.shards.replicated or world().global_rank == 0, self.device)

    def allocate(self, event: Event) -> EventReport | None:
        """Combine the statistics of all processes, decide, and apply the decision.

        Collective: all processes call it at the same step.

        Returns:
            A report; None if the method keeps the previous decision, because its target was reached before.

        Raises:
            RuntimeError: on all processes, if their decisions differ.
        """
        began = time.perf_counter()
        if isinstance(self.method, RotatingMethod) and self.method.rotates_at(event):
            self.method.take_spectrum(rotate_adapters(self.shards, self.decisions.latest.mask_N, self.device))
        statistics = self.summed(self.method.contribution())
        gathered = time.perf_counter()
        decision = self.method.allocate(statistics, event, self.decisions.latest)
        if not all_equal(decision.digest(), self.device):
            raise RuntimeError(
                f"processes disagree on the allocation of step {event.step} (digest {decision.digest()[:12]} here): "
                "their statistics or hardware differ; nothing was applied, resume from the last checkpoint"
            )
        if decision is self.decisions.latest:
            return None
        solved = time.perf_counter()
        changed = self.decisions.take(decision)
        return EventReport(
            decision,
            event,
            gather=gathered - began,
            solve=solved - gathered,
            apply=time.perf_counter() - solved,
            changed=changed,
            ranks=tuple(decision.ranks(self.adapted.layout)),
            kept_N=self.in_initial_rows(decision.mask_N),
        )

    def hold(self, decision: RankDecision) -> None:
        """After every later step, zero the singular values that ``decision`` drops (if its ``hold`` is set)."""
        dropped_N = ~decision.mask_N if decision.hold else torch.zeros_like(decision.mask_N)
        self._zeroed = {index: _by_run(view, dropped_N) for index, view in self.shards.views.items()}

    @torch.no_grad()
    def apply(self, decision: RankDecision) -> None:
        """Bring masks, masters, copies and moments in line with ``decision``. No communication."""
        policy = self.method.policy
        self.adapted.set_mask(decision.mask_N, policy.gate_forward, decision.hold)
        if not decision.hold and decision.step < self.step:
            return  # resumed from a checkpoint: rows that have grown back since the event keep their values
        ranks = list(self.adapted.layout.ranks)
        prunes = [not bool(mask_R.all()) for mask_R in decision.mask_N.split(ranks)]
        drops = (~decision.mask_N).to(self.device).split(ranks)  # one copy to the device for all matrices
        for owned in self.shards.owned.values():
            if prunes[owned.module] and (owned.factor == "E" or policy.zero_vectors):
                self.shards.zero_rows(owned, drops[owned.module], policy.zero_moments)

    @torch.no_grad()
    def start_rows(self, new_N: Tensor, sigma: float) -> None:
        """Set E of the rows ``new_N`` (bool, CPU) to ``sigma`` in masters and copies, and zero its moments."""
        news = new_N.split(list(self.adapted.layout.ranks))
        for owned in self.shards.owned.values():
            if owned.factor == "E" and bool(news[owned.module].any()):
                self.shards.write_rows(owned, news[owned.module], sigma, zero_moments=True)


def _by_run(view: LocalView, dropped_N: Tensor) -> list[Tensor]:
    dropped_n = dropped_N[view.rows_n.cpu()].to(view.rows_n.device)
    if not bool(dropped_n.any()):
        return []
    return list(dropped_n.split([s.numel() for s in view.sigma_slices()]))
