"""Spectral: plain LoRA, trained wide, cut in mid-run by one threshold over exact singular values, trained on.

Shape legend: N = rows that exist now.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from salient_ds.methods.base import BaseMethod, modules_of_rows, refuse_non_finite
from salient_ds.methods.budget_rule import BudgetRule
from salient_ds.methods.spectral.options import SpectralConfig
from salient_ds.ranks import Event, RankDecision, RankLayout, ReadShard, Spectrum, StepView
from salient_ds.salience.select import score_at_cut
from salient_ds.salience.sensitivity import row_means


class Spectral(BaseMethod):
    """A method of our own. Its adapters are LoRA's, B A, without a penalty, and train as fast.

    At an event, every matrix is rotated into the singular basis of B A, with Adam's moments. Then one threshold over
    the rows of all matrices keeps the budget. All matrices have the same scaling, so it does not enter the scores. The
    removed rows can be dropped at once (``speed.compaction``), and the rest of the run costs what the final ranks do.

    ``score: gate_fisher`` needs gradients. So rows are rotated ``window`` steps before the event, and after each of
    these steps N numbers are summed over processes: sigma dL/dsigma of a row is the product of its row of A with that
    row's gradient.

    Related: PARA cuts after training. AdaLoRA and SalientLoRA keep B diag(E) A near orthonormal by a penalty instead.

    Raises:
        ValueError: the schedule contradicts itself.
    """

    def __init__(self, config: SpectralConfig, layout: RankLayout, total_steps: int) -> None:
        super().__init__(config, layout, total_steps)
        self.config = config
        self._rule = BudgetRule(config, layout)
        self._spectrum: Spectrum | None = None
        self._gate_N: Tensor | None = None
        self._squares_N = torch.zeros(layout.total, dtype=torch.float64)

    def resized(self, layout: RankLayout) -> None:
        """Continue with the rows that the last event kept."""
        self.layout = layout
        self._squares_N = torch.zeros(layout.total, dtype=torch.float64)
        self._spectrum = None

    def observe(self, view: StepView, step: int) -> None:
        """Take sigma dL/dsigma of this process's elements, in the steps of a window."""
        if not self.sums_at(step):
            return
        for part in view.parts:
            if part.factor != "A":
                continue
            share_R = row_means(part, view.value(part) * view.grad(part)) * part.shape[1]
            if self._gate_N is None:
                self._gate_N = torch.zeros(self.layout.total, dtype=torch.float64, device=share_R.device)
            first = self.layout.offsets[part.module]
            self._gate_N[first : first + len(share_R)] += share_R

    def sums_at(self, step: int) -> bool:
        """In the windows of ``score: gate_fisher``."""
        return any(e.window_start <= step <= e.step for e in self.events if not self.rotates_at(e))

    def step_contribution(self) -> dict[str, Tensor]:
        """``gate``: this process's share of sigma dL/dsigma of every row (N,) float64."""
        gate_N, self._gate_N = self._gate_N, None
        return {"gate": torch.zeros(self.layout.total, dtype=torch.float64) if gate_N is None else gate_N}

    def take_sums(self, sums: dict[str, Tensor], step: int) -> None:
        """Add the square of the step's sums."""
        self._squares_N = self._squares_N.to(sums["gate"].device) + sums["gate"].double().square()

    def rotates_at(self, event: Event) -> bool:
        """Before every event; with ``score: gate_fisher``, before the first of each pair."""
        rotating = self.events[::2] if self.config.score == "gate_fisher" else self.events
        return any(event.step == other.step for other in rotating)

    def take_spectrum(self, spectrum: Spectrum) -> None:
        """Keep what the rotation found until the event is decided."""
        self._spectrum = spectrum

    def allocate(self, statistics: dict[str, Tensor], event: Event, previous: RankDecision) -> RankDecision:
        """Keep the ``event.total_rank`` rows with the highest scores.

        Raises:
            ValueError: a score is not finite.
        """
        if self.config.score == "gate_fisher" and self.rotates_at(event):
            self._squares_N = torch.zeros(self.layout.total, dtype=torch.float64)
            return RankDecision(event.step, event.total_rank, previous.mask_N.clone())
        score_N = self._scores(event)
        bad = modules_of_rows(self.layout, ~score_N.isfinite())
        refuse_non_finite("scores of rows", self.layout.modules, bad, f"at step {event.step}")
        if self.config.compete == "in_matrix":
            score_N = -places_in_matrices(score_N, previous.mask_N, self.layout)
        else:
            score_N = self._rule.per_parameter(score_N, self.layout)
        mask_N = self._rule.select(score_N, event, previous.mask_N, self.layout)
        threshold = score_at_cut(score_N, mask_N, previous.mask_N)
        self._spectrum = None
        return RankDecision(event.step, event.total_rank, mask_N, threshold)

    def _scores(self, event: Event) -> Tensor:
        if self.config.score == "gate_fisher":
            return self._squares_N.cpu() / event.window
        assert self._spectrum is not None, "rotated before every event"
        if self.config.score == "random":
            return random_scores(self._spectrum.sigma_N)
        return self._spectrum.sigma_N.square() if self.config.score == "energy" else self._spectrum.curvature_N

    def shared_state(self) -> dict[str, Any]:
        """The sums of an open window."""
        return {"squares_N": self._squares_N.cpu()}

    def load_state(self, shared: dict[str, Any], read: ReadShard) -> None:
        """Continue in the middle of a window."""
        self._squares_N = shared["squares_N"].clone()


def random_scores(sigma_N: Tensor) -> Tensor:
    """A draw of N numbers (float64). Its seed is in the digits of ``sigma_N``.

    So it is the same on every process, and another one in every run.
    """
    digest = hashlib.sha256(sigma_N.double().cpu().numpy().tobytes()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.rand(len(sigma_N), dtype=torch.float64, generator=generator)


def places_in_matrices(score_N: Tensor, live_N: Tensor, layout: RankLayout) -> Tensor:
    """Place of each row among the rows of its matrix (N,) float64: 0 for the highest score.

    Rows not in ``live_N`` come last. Equal scores keep the order of the rows.
    """
    place_N = torch.empty(layout.total, dtype=torch.float64)
    score_N = torch.where(live_N.to(score_N.device), score_N, float("-inf"))
    for first, rank in zip(layout.offsets[:-1], layout.ranks, strict=True):
        order = torch.argsort(score_N[first : first + rank], descending=True, stable=True)
        place_N[first + order.to(place_N.device)] = torch.arange(rank, dtype=torch.float64)
    return place_N
