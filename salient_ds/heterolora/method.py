"""HeteroLoRA (Zhang et al. 2024, arXiv 2406.14956): LoRA and shortcut modules compete for being on at all.

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
    """Before chosen steps all modules are switched on and scored, and the best share of them stays on until the next.

    A module that is off contributes nothing and gets exactly zero gradients (adapters/switched.py, shortcut.py). What
    happens to its weights and optimizer state is ``disabled_state``; frozen, it goes on where it stopped when it comes
    back, so that the function jumps there, as in the released code.

    Differs from the released code: scores are those of gradients summed over all processes (there every process
    decides for itself); an event whose scores are not finite is skipped (there NaN wins); SNIP and SYNFLOW, which are
    zero while B = 0, fall back to GRAD-NORM until every module has been trained (there a random draw locks in); probe
    batches leave accumulated gradients, random state and data order alone; modules are in evaluation mode while they
    are scored. Nothing is gained in time or memory: all modules are allocated, and computed, all the time.

    Raises:
        ValueError: an unknown or unusable proxy, a budget below one module, or an interval in epochs of unknown length.
    """

    name = "heterolora"
    policy = MaskPolicy(gate_forward=True, zero_vectors=False, zero_moments=False)
    events: Sequence[Event] = ()
    """None follows a step: see ``searches``."""
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
        """Events of the run; each comes before the step that follows its own."""
        self.probes = ProbeSettings(config.scale_free, config.tolerance)
        self.needs_before = config.disabled_state != "decay"
        self.rates = ModuleRates(len(layout.modules))
        self.history: list[dict[str, Any]] = []
        """One entry per event: step, proxy, scores and on by module, or why it was skipped."""
        self._constant_until = constant_steps(config, steps_per_epoch)
        self._due = {event.step: event for event in self.searches}
        self._generator = torch.Generator().manual_seed(config.tie_seed)
        self._probe: tuple[str, Tensor] | None = None

    def attach(self, layout: RankLayout, views: Sequence[StepView]) -> None:
        """Nothing to prepare."""
        assert layout == self.layout

    def probe_due(self, step: int) -> Event | None:
        """The event before the step after ``step``, once."""
        done = bool(self.history) and self.history[-1]["step"] >= step
        return None if done else self._due.get(step)

    def proxy_of(self, event: Event) -> str:
        """The configured proxy; CONSTANT in the first epochs if they are for drawing."""
        return "constant" if event.step < self._constant_until else self.config.proxy

    def take_probe(self, event: Event, proxy: str, scores: ProbeScores) -> str | None:
        """Keep the scores, or say what to do instead: skip the event (not finite), or fall back to GRAD-NORM.

        Raises:
            ValueError: the scores decide nothing, and ``degenerate`` is "refuse".
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
        """Keep what the optimizer must not change."""
        self.rates.keep(cast(AdamView, view), step)

    def observe(self, view: StepView, step: int) -> None:
        """Put it back."""
        if self.needs_before:
            self.rates.settle(cast(AdamView, view))

    def end_step(self, step: int, penalty_M2: Tensor | None) -> None:
        """Count the step for the modules that are on."""
        self.rates.end_step()

    def contribution(self) -> dict[str, Tensor]:
        """Nothing: scores are global when they are taken in."""
        return {}

    def allocate(self, statistics: dict[str, Tensor], event: Event, previous: RankDecision) -> RankDecision:
        """Switch on the best modules within the budget; ``previous`` itself if the event is skipped."""
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
        """Modules that these scores switch on; equal ones are drawn with the generator of ``tie_seed``."""
        share = KeptShare(self.config.keep, self.config.mode, self.config.budget_unit)
        return select_modules_on(score_M, self.candidates, share, self._generator)

    def local_state(self) -> Iterator[tuple[str, Part, Tensor]]:
        """Nothing is sharded."""
        return iter(())

    def shared_state(self) -> dict[str, Any]:
        """Which modules are on, how many steps each has taken, the history, and where the draws are."""
        return {"on": list(self.rates.on_M), "steps": list(self.rates.steps_M), "history": list(self.history),
                "generator": self._generator.get_state()}  # fmt: skip

    def load_state(self, shared: dict[str, Any], read: ReadShard) -> None:
        """Go on as if there had been no interruption."""
        self.rates.on_M, self.rates.steps_M = list(shared["on"]), list(shared["steps"])
        self.history = list(shared["history"])
        self._generator.set_state(shared["generator"])

    @property
    def record(self) -> SearchRecord:
        """What has been decided so far."""
        return SearchRecord(self.layout.modules, self.history, self.config.mode, self.config.budget_unit)

    def write_results(self, folder: Path, run: Mapping[str, Any]) -> None:
        """A configuration that trains the chosen modules alone, scores and pictures, into ``folder``/search."""
        write_search(folder / "search", parse_config(dict(run)), self.record)
