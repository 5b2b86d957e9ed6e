"""HeteroLoRA (Zhang et al. 2024, arXiv 2406.14956): LoRA and shortcut modules compete to be switched on.

Shape legend: M = modules, N = rows (sum of all ranks).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from salient_ds.config.run import parse_config
from salient_ds.heterolora.module_rates import ModuleRates
from salient_ds.heterolora.module_select import Candidates, KeptShare, ModuleChoice, select_modules_on
from salient_ds.heterolora.options import HeteroLoRAConfig
from salient_ds.heterolora.probing import ProbeScores, ProbeSettings
from salient_ds.heterolora.proxies import check_proxy, check_scores
from salient_ds.heterolora.results import SearchRecord, write_search
from salient_ds.heterolora.schedule import SearchSpace, constant_steps, search_events
from salient_ds.ranks import AdamView, Event, MaskPolicy, Part, RankDecision, RankLayout, ReadShard, StepView

log = logging.getLogger(__name__)


class HeteroLoRA:
    """Switches whole modules on and off at events, which come before chosen optimizer steps.

    At an event all modules are switched on and scored. The best share of them stays on until the next event. A module
    that is off contributes nothing to the output, and its gradients are exactly zero (switched.py, shortcut.py).
    ``disabled_state`` says what happens to its weights and optimizer state. With "freeze", a module that is switched on
    again continues where it stopped. The model's function jumps at that moment, as in the released code.

    Differs from the released code:

    * Scores come from gradients summed over all processes. There, every process decides by itself.
    * An event whose scores are not finite is skipped. There, NaN wins.
    * SNIP and SYNFLOW, which are zero while B = 0, fall back to GRAD-NORM until every module has been trained. There,
      the first modules are drawn at random, and that choice is locked in.
    * Probe batches leave accumulated gradients, random state and data order unchanged.
    * Modules are in evaluation mode while they are scored.

    HeteroLoRA saves neither time nor memory: every module is allocated and computed all the time.

    Raises:
        ValueError: the proxy is unknown or unusable, the budget is below one module, or the interval is given in epochs
            whose length is unknown.
    """

    name = "heterolora"
    policy = MaskPolicy(gate_forward=True, zero_vectors=False, zero_moments=False)
    events: Sequence[Event] = ()
    """Always empty: no event follows a step. HeteroLoRA's events are ``searches``."""
    needs_penalty = False

    def __init__(
        self, config: HeteroLoRAConfig, layout: RankLayout, total_steps: int, steps_per_epoch: int | None = None
    ) -> None:
        check_proxy(config.proxy)
        self.config = config
        self.layout = layout
        space = SearchSpace.of(layout)
        self.candidates = Candidates(layout.modules, space.shortcuts, space.parameters)
        self.searches: Sequence[Event] = search_events(config, space, total_steps, steps_per_epoch)
        """Events of the run. One with ``step`` s is taken after s applied steps, before step s + 1."""
        self.probes = ProbeSettings(config.scale_free, config.tolerance)
        self.needs_before = config.disabled_state != "decay"
        self.rates = ModuleRates(len(layout.modules))
        self.history: list[dict[str, Any]] = []
        """One entry per event: step, proxy, and either scores and on/off by module, or why the event was skipped."""
        self._constant_until = constant_steps(config, steps_per_epoch)
        self._due = {event.step: event for event in self.searches}
        self._generator = torch.Generator().manual_seed(config.tie_seed)
        self._probe: tuple[str, Tensor] | None = None

    def attach(self, layout: RankLayout, views: Sequence[StepView]) -> None:
        """Nothing to prepare."""
        assert layout == self.layout

    def probe_due(self, step: int) -> Event | None:
        """The event that is due after ``step`` applied steps; None if there is none, or if it has been taken."""
        done = bool(self.history) and self.history[-1]["step"] >= step
        return None if done else self._due.get(step)

    def proxy_of(self, event: Event) -> str:
        """The configured proxy, or "constant" during the first ``constant_epochs``."""
        return "constant" if event.step < self._constant_until else self.config.proxy

    def take_probe(self, event: Event, proxy: str, scores: ProbeScores) -> str | None:
        """Keep the scores for :meth:`allocate`, or name another proxy to score by.

        Scores that are not finite skip the event: nothing is kept, and ``allocate`` changes nothing.

        Returns:
            "grad_norm" if these scores cannot rank the modules, else None.

        Raises:
            ValueError: the scores cannot rank the modules, and ``degenerate`` is "refuse".
        """
        self._probe = None
        verdict = check_scores(proxy, self.layout.modules, scores.score_M, scores.trained_M)
        if verdict.kind == "ok":
            self._probe = (proxy, scores.score_M)
            return None
        if verdict.kind == "non_finite":
            log.warning("event after step %d skipped, modules stay as they are: %s", event.step, verdict.reason)
            self.history.append({"step": event.step, "proxy": proxy, "skipped": verdict.reason})
            return None
        if self.config.degenerate == "refuse":
            raise ValueError(
                f"the event after step {event.step} cannot rank its modules ({verdict.reason}): set "
                "method.degenerate=grad_norm, or method.proxy=grad_norm"
            )
        log.warning("event after step %d is ranked by grad_norm: %s", event.step, verdict.reason)
        return "grad_norm"

    def before(self, view: StepView, step: int) -> None:
        """Save what the optimizer step must not change (:class:`ModuleRates`)."""
        self.rates.keep(cast(AdamView, view), step)

    def observe(self, view: StepView, step: int) -> None:
        """Restore it, and correct the update of modules that have been off."""
        if self.needs_before:
            self.rates.settle(cast(AdamView, view))

    def end_step(self, step: int, penalty_M2: Tensor | None) -> None:
        """Count the step for the modules that are on."""
        self.rates.end_step()

    def contribution(self) -> dict[str, Tensor]:
        """Nothing: scores are already global when :meth:`take_probe` gets them."""
        return {}

    def allocate(self, statistics: dict[str, Tensor], event: Event, previous: RankDecision) -> RankDecision:
        """Switch on the best modules within the budget. Returns ``previous`` itself if the event is skipped."""
        if self._probe is None:
            return previous
        proxy, score_M = self._probe
        self._probe = None
        choice = self.choose(score_M)
        on_M = [bool(on) for on in choice.mask_M]
        self.rates.switch(on_M, reset=self.config.disabled_state == "reset")
        self.history.append({"step": event.step, "proxy": proxy, "scores": score_M.tolist(), "on": on_M,
                             "budget": choice.budget, "spent": choice.spent})  # fmt: skip
        mask_N = choice.mask_M.cpu()[self.layout.module_of_row_N]
        return RankDecision(event.step, event.total_rank, mask_N, choice.threshold, hold=event == self.searches[-1])

    def choose(self, score_M: Tensor) -> ModuleChoice:
        """The modules that these scores switch on. Ties are drawn with the generator seeded by ``tie_seed``."""
        share = KeptShare(self.config.keep, self.config.mode, self.config.budget_unit)
        return select_modules_on(score_M, self.candidates, share, self._generator)

    def local_state(self) -> Iterator[tuple[str, Part, Tensor]]:
        """Nothing is sharded."""
        return iter(())

    def shared_state(self) -> dict[str, Any]:
        """Which modules are on, how many steps each has taken, the history, and the state of the tie generator."""
        return {"on": list(self.rates.on_M), "steps": list(self.rates.steps_M), "history": list(self.history),
                "generator": self._generator.get_state()}  # fmt: skip

    def load_state(self, shared: dict[str, Any], read: ReadShard) -> None:
        """Continue as if the run had not been interrupted."""
        self.rates.on_M, self.rates.steps_M = list(shared["on"]), list(shared["steps"])
        self.history = list(shared["history"])
        self._generator.set_state(shared["generator"])

    @property
    def record(self) -> SearchRecord:
        """What has been decided so far."""
        return SearchRecord(self.layout.modules, self.history, self.config.mode, self.config.budget_unit)

    def write_results(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Write a configuration that trains only the chosen modules, scores and pictures to ``folder``/search."""
        write_search(folder / "search", parse_config(dict(run)), self.record)
