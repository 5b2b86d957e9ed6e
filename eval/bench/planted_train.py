"""Training of one student in plain torch: one process, fp32, no DeepSpeed.

Decisions take effect in the order of :class:`salient_ds.zero.engine.AllocatingEngine`: optimizer step, dropped values
back to zero, observation, decisions that waited for this step, then the event of the step.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from salient_ds.adapters.inject import AdaptedModel, module_generator
from salient_ds.methods.base import Part, RankDecision, ScoringMethod, initial_decision
from salient_ds.salience.budget import Event

from .planted_plan import Arm, ProblemSize, Regime, Training
from .planted_problem import Problem, held_out_loss, make_problem, update_error
from .planted_students import Student, build_student

KEPT_EVENTS = 20
"""Events of a run that its record shows, evenly spread."""


class WholeView:
    """All factors of all adapters as one view: nothing is sharded here."""

    key = "whole"

    def __init__(self, adapted: AdaptedModel) -> None:
        self._parameters: dict[Part, torch.nn.Parameter] = {}
        for module, adapter in enumerate(adapted.adapters.values()):
            for factor, address in adapter.factors().items():
                part = Part(factor, module, 0, address.parameter.numel(), address.shape, address.rank_axis)
                self._parameters[part] = address.parameter
        self.parts = tuple(self._parameters)
        self._rows_N = torch.arange(adapted.layout.total)

    def value(self, part: Part) -> Tensor:
        return self._parameters[part].detach().view(-1)

    def grad(self, part: Part) -> Tensor:
        grad = self._parameters[part].grad
        assert grad is not None
        return grad.view(-1)

    def sigma(self) -> tuple[Tensor, Tensor]:
        return self._rows_N, torch.cat([self.value(part) for part in self.parts if part.factor == "E"])


@dataclass
class Run:
    """A student between two steps."""

    student: Student
    optimizer: torch.optim.Optimizer
    view: WholeView
    latest: RankDecision
    held: RankDecision
    """Whose dropped values are zeroed after every step (differs from ``latest`` while that one waits)."""
    pending: list[RankDecision] = field(default_factory=list)
    decisions: list[RankDecision] = field(default_factory=list)

    @classmethod
    def start(cls, student: Student, training: Training, lr: float) -> Run:
        parameters = [p for p in student.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0, fused=True)
        layout, policy = student.adapted.layout, student.method.policy
        initial = initial_decision(policy, layout)
        if not bool(initial.mask_N.all()):
            student.adapted.set_mask(initial.mask_N, policy.gate_forward, initial.hold)
        view = WholeView(student.adapted)
        student.method.attach(layout, [view])
        return cls(student, optimizer, view, initial, initial)

    def backward(self, loss: Tensor, step: int) -> None:
        """Gradients, with the penalty's and what a method needs of the pass."""
        method, scores = self.student.method, self.student.adapted.scores
        if scores is not None and isinstance(method, ScoringMethod) and method.scored_at(step):
            scores.arm(1.0, torch.device("cpu"), None)
        loss.backward()

    @torch.no_grad()
    def after_optimizer(self, step: int, norms_M2: Tensor | None) -> None:
        """Everything that follows the optimizer's step."""
        method = self.student.method
        if self.pending:
            self.held = self.pending[0]
        if self.held.hold:
            self._fill(~self.held.mask_N, ("E",), 0.0, moments=False)
        method.observe(self.view, step)
        if self.pending:
            self._apply(self.pending.pop(0))
        scores = self.student.adapted.scores
        if scores is not None and scores.armed and isinstance(method, ScoringMethod):
            scores.disarm()
            method.take_scores(scores.score_M, step)
        method.end_step(step, norms_M2)
        for event in method.events:
            if event.step == step:
                self._allocate(event)

    @torch.no_grad()
    def finish(self) -> None:
        """A decision that still waits for its step takes effect."""
        if self.pending:
            self._apply(self.pending.pop(0))

    def ranks(self) -> dict[str, int]:
        """Live rank of every adapted matrix."""
        adapted = self.student.adapted
        return dict(zip(adapted.adapters, self.latest.ranks(adapted.layout), strict=True))

    def _allocate(self, event: Event) -> None:
        method, previous = self.student.method, self.latest
        decision = method.allocate(method.contribution(), event, previous)
        if decision is previous:
            return
        self.latest = decision
        self.decisions.append(decision)
        if method.policy.delay:
            self.pending.append(decision)
            return
        self._apply(decision)
        if method.policy.start_sigma is not None:
            self._fill(decision.mask_N & ~previous.mask_N, ("E",), method.policy.start_sigma, moments=True)

    def _apply(self, decision: RankDecision) -> None:
        policy = self.student.method.policy
        self.held = decision
        self.student.adapted.set_mask(decision.mask_N, policy.gate_forward, decision.hold)
        self._fill(~decision.mask_N, None if policy.zero_vectors else ("E",), 0.0, policy.zero_moments)

    def _fill(self, rows_N: Tensor, factors: tuple[str, ...] | None, value: float, moments: bool) -> None:
        """Set rows of the given factors (None: all that have rows) to ``value``, and their moments to zero if asked."""
        adapted = self.student.adapted
        chosen = rows_N.split(list(adapted.layout.ranks))
        for adapter, rows_R in zip(adapted.adapters.values(), chosen, strict=True):
            if not bool(rows_R.any()):
                continue
            for name, address in adapter.factors().items():
                if address.rank_axis is None or (factors is not None and name not in factors):
                    continue
                address.parameter.data.transpose(0, address.rank_axis)[rows_R] = value
                state = self.optimizer.state[address.parameter] if moments else {}
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment in state:
                        state[moment].transpose(0, address.rank_axis)[rows_R] = 0


class Diverged(RuntimeError):
    """The loss is no number any more."""


def train(arm: Arm, size: ProblemSize, training: Training, regime: Regime, seed: int, lr: float) -> dict[str, Any]:
    """Train one student; a pure function of its arguments (on one machine, with one thread).

    Returns:
        name, regime, seed, lr, planted and recovered ranks per matrix, loss (held out, relative to the frozen
        network's), update_error, events, seconds; for a run that diverged ``error`` instead of a loss.
    """
    began = time.perf_counter()
    problem = make_problem(size, regime, seed)
    run = Run.start(build_student(arm, problem, size, training, seed), training, lr)
    result: dict[str, Any] = {"arm": arm.name, "regime": regime, "seed": seed, "lr": lr}
    try:
        steps(run, problem, training, seed)
    except (Diverged, ValueError) as error:  # methods refuse statistics that are not finite
        return result | {"error": str(error), "loss": None, "seconds": round(time.perf_counter() - began, 2)}
    run.finish()
    run.student.model.eval()
    live = run.ranks()
    events = run.decisions[:: max(1, math.ceil(len(run.decisions) / KEPT_EVENTS))]
    layout = run.student.adapted.layout
    return result | {
        "planted": list(problem.ranks.values()),
        "recovered": [live.get(name, 0) for name in problem.ranks],
        "loss": held_out_loss(run.student.model, problem),
        "update_error": update_error(student_updates(run.student, problem), problem),
        "num_events": len(run.decisions),
        "events": [{"step": d.step, "budget": d.budget, "ranks": d.ranks(layout)} for d in events],
        "seconds": round(time.perf_counter() - began, 2),
    }


def steps(run: Run, problem: Problem, training: Training, seed: int) -> None:
    """All steps of a run.

    Raises:
        Diverged: the loss is not finite.
        ValueError: a method's statistics are not finite.
    """
    student, method = run.student, run.student.method
    penalty = student.adapted.penalty
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    peak = run.optimizer.param_groups[0]["lr"]
    draw = module_generator(seed, "batches")
    student.model.train()
    for step in range(1, training.steps + 1):
        rows_n = torch.randint(len(problem.inputs_nD), (training.batch,), generator=draw)
        if penalty is not None:
            penalty.arm(1.0, torch.device("cpu"))
        loss = F.mse_loss(student.model(problem.inputs_nD[rows_n]), problem.targets_nD[rows_n]) / problem.base_error
        if not math.isfinite(loss.item()):
            raise Diverged(f"the loss of step {step} is {loss.item()}")
        run.backward(loss, step)
        torch.nn.utils.clip_grad_norm_(parameters, training.clip)
        if method.needs_before:
            method.before(run.view, step)
        run.optimizer.param_groups[0]["lr"] = peak * training.rates.rate(step)
        run.optimizer.step()
        run.after_optimizer(step, penalty.norms_M2 if penalty is not None else None)
        run.optimizer.zero_grad()


@torch.no_grad()
def student_updates(student: Student, problem: Problem) -> dict[str, Tensor]:
    """Dense update of every matrix (O, I), read off the adapters' outputs for unit inputs; zero without adapter."""
    found = {name: torch.zeros_like(update_OI) for name, update_OI in problem.updates.items()}
    for name, adapter in student.adapted.adapters.items():
        eye_II = torch.eye(adapter.in_features)
        found[name] = (adapter(eye_II) - adapter.base(eye_II)).T
    return found
