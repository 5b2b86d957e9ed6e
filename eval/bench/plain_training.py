"""Training in plain PyTorch, for benchmarks and for the tests that compare the engine with it.

It uses one process, fp32, no DeepSpeed and no sharding. So the method sees whole factors, and decisions change whole
factors as the method's :class:`~salient_ds.ranks.MaskPolicy` says. Decisions are ordered by the engine's own code
(:mod:`salient_ds.engine.decisions`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.engine.decisions import Decisions
from salient_ds.heterolora.probing import ProbeScores, ProbingMethod
from salient_ds.methods.duties import Method, RotatingMethod, ScoringMethod, SummingMethod
from salient_ds.ranks import AdamSettings, Event, Part, RankDecision, Spectrum, initial_decision
from salient_ds.salience.rotation import Factors, rotate

MOMENTS = ("exp_avg", "exp_avg_sq")


class WholeView:
    """All factors of all adapters in one view, unsharded."""

    key = "whole"

    def __init__(self, adapted: AdaptedModel, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
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

    def sigma_grad(self) -> Tensor:
        return torch.cat([self.grad(part) for part in self.parts if part.factor == "E"])

    def moments(self, part: Part) -> dict[str, Tensor]:
        state = self._optimizer.state.get(self._parameters[part], {})
        return {name: state[name].view(-1) for name in MOMENTS if name in state}

    def settings(self, part: Part) -> AdamSettings:
        mine = self._parameters[part]
        (group,) = [g for g in self._optimizer.param_groups if any(p is mine for p in g["params"])]
        return AdamSettings(float(group["lr"]), group["betas"], group["eps"], group["weight_decay"], decoupled=True)


class PlainTraining:
    """Runs a method alongside the caller's training loop.

    Each step of the loop has to look like this::

        training.before_forward(step)
        ...                                       # forward pass, loss.backward()
        training.before_optimizer(step)
        optimizer.step()
        training.after_optimizer(step, norms_M2)
    """

    def __init__(self, adapted: AdaptedModel, method: Method, optimizer: torch.optim.Optimizer) -> None:
        self.adapted, self.method, self.optimizer = adapted, method, optimizer
        layout, policy = adapted.layout, method.policy
        initial = initial_decision(policy, layout)
        if not bool(initial.mask_N.all()):
            adapted.set_mask(initial.mask_N, policy.gate_forward, initial.hold)
        self.decisions = Decisions(policy, self, initial, initial)
        self.taken: list[RankDecision] = []
        """All decisions so far, oldest first."""
        self.view = WholeView(adapted, optimizer)
        method.attach(layout, [self.view])
        self._events = {event.step: event for event in method.events}
        self._scoring = method if isinstance(method, ScoringMethod) else None
        if self._scoring is not None:
            self._scoring.choose_reduction(1)

    def before_forward(self, step: int, probe: Callable[[str], ProbeScores] | None = None) -> None:
        """Turn on scoring of ``step``, if the method asks for it, and take the event that comes before it, if any.

        Adapters look in the forward pass whether scoring is on. So this comes first.

        Args:
            probe: ``probe(proxy)`` returns the proxy's scores; for methods whose events come before a step.
        """
        scores = self.adapted.scores
        if scores is not None and self._scoring is not None and self._scoring.scored_at(step) and not scores.armed:
            scores.arm(1.0, torch.device("cpu"), None)
        method = self.method
        if not isinstance(method, ProbingMethod):
            return
        event = method.probe_due(step - 1)
        if event is None:
            return
        assert probe is not None, "a method that probes needs scores"
        proxy: str | None = method.proxy_of(event)
        while proxy is not None:
            proxy = method.take_probe(event, proxy, probe(proxy))
        self._allocate(event)

    def before_optimizer(self, step: int) -> None:
        """Let the method observe the final gradients and the values before the update."""
        if self.method.needs_before:
            self.method.before(self.view, step)

    @torch.no_grad()
    def after_optimizer(self, step: int, norms_M2: Tensor | None) -> None:
        """Do everything that follows the optimizer step, including the event of ``step``.

        Args:
            norms_M2: norms of the orthogonality penalty, None without a penalty.
        """
        self.decisions.before_observation()
        held = self.decisions.held
        if held.hold and not bool(held.mask_N.all()):
            self._fill(~held.mask_N, ("E",), 0.0, moments=False)
        self.method.observe(self.view, step)
        self.decisions.settle()
        scores = self.adapted.scores
        if scores is not None and scores.armed and self._scoring is not None:
            scores.disarm()
            self._scoring.take_scores(scores.score_M, step)
        if isinstance(self.method, SummingMethod) and self.method.sums_at(step):
            self.method.take_sums(self.method.step_contribution(), step)
        self.method.end_step(step, norms_M2)
        event = self._events.get(step)
        if event is not None:
            self._allocate(event)

    @torch.no_grad()
    def finish(self) -> None:
        """Apply a decision that is still waiting for its step."""
        self.decisions.settle()

    def ranks(self) -> dict[str, int]:
        """Live rank of every adapted matrix."""
        return dict(zip(self.adapted.adapters, self.decisions.latest.ranks(self.adapted.layout), strict=True))

    def _allocate(self, event: Event) -> None:
        if isinstance(self.method, RotatingMethod) and self.method.rotates_at(event):
            self.method.take_spectrum(self._rotate())
        decision = self.method.allocate(self.method.contribution(), event, self.decisions.latest)
        if decision is not self.decisions.latest:
            self.decisions.take(decision)
            self.taken.append(decision)

    def _rotate(self) -> Spectrum:
        """Rotate the live rows of every adapter into the singular basis of its product."""
        layout = self.adapted.layout
        sigma_N, curvature_N = torch.zeros(2, layout.total, dtype=torch.float64)
        masks = self.decisions.latest.mask_N.split(list(layout.ranks))
        for adapter, mask_R, first in zip(self.adapted.adapters.values(), masks, layout.offsets, strict=False):
            rows_r = mask_R.nonzero().view(-1)
            A, B = (adapter.factors()[name].parameter for name in "AB")
            states = [{name: self.optimizer.state[p][name] for name in MOMENTS} for p in (A, B)]
            of_A = {name: value[rows_r] for name, value in states[0].items()}
            of_B = {name: value[:, rows_r] for name, value in states[1].items()}
            rotated = rotate(Factors(A.data[rows_r], B.data[:, rows_r], of_A, of_B))
            new = rotated.factors
            A.data[rows_r], B.data[:, rows_r] = new.A_rI, new.B_Or
            for name in MOMENTS:
                states[0][name][rows_r], states[1][name][:, rows_r] = new.moments_A[name], new.moments_B[name]
            sigma_N[first + rows_r], curvature_N[first + rows_r] = rotated.sigma_r, rotated.curvature_r
        return Spectrum(sigma_N, curvature_N)

    def hold(self, decision: RankDecision) -> None:
        """Nothing to do here: :meth:`after_optimizer` reads the held decision itself."""

    @torch.no_grad()
    def apply(self, decision: RankDecision) -> None:
        """Set masks, values and moments to the decision, as the method's policy says."""
        policy = self.method.policy
        self.adapted.set_mask(decision.mask_N, policy.gate_forward, decision.hold)
        self._fill(~decision.mask_N, None if policy.zero_vectors else ("E",), 0.0, policy.zero_moments)

    @torch.no_grad()
    def start_rows(self, new_N: Tensor, sigma: float) -> None:
        """Set E of new rows to ``sigma`` and their moments to zero."""
        self._fill(new_N, ("E",), sigma, moments=True)

    def _fill(self, rows_N: Tensor, factors: tuple[str, ...] | None, value: float, moments: bool) -> None:
        """Set rows of the given factors to ``value``.

        Args:
            rows_N: mask of the rows.
            factors: names of the factors; None: all factors that have a rank axis.
            moments: set the moments of these rows to zero, too.
        """
        chosen = rows_N.split(list(self.adapted.layout.ranks))
        for adapter, rows_R in zip(self.adapted.adapters.values(), chosen, strict=True):
            if not bool(rows_R.any()):
                continue
            for name, address in adapter.factors().items():
                if address.rank_axis is None or (factors is not None and name not in factors):
                    continue
                address.parameter.data.transpose(0, address.rank_axis)[rows_R] = value
                state = self.optimizer.state[address.parameter] if moments else {}
                for moment in MOMENTS:
                    if moment in state:
                        state[moment].transpose(0, address.rank_axis)[rows_R] = 0
