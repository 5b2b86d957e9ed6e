"""How many singular values every module of a trained adapter keeps, given those of all modules. No torch.

One order of all values decides, whatever module they are in. Dropping singular values s of a module changes its update
by a matrix whose squared Frobenius norm is the sum of s^2, and no other matrix of that rank is closer (Eckart and
Young, 1936). The error of an adapter is the sum over its modules. So:

- rank: the largest values are kept. No adapter with that total rank has a smaller error.
- energy: as few values as hold the given share of the sum of s^2. No adapter with that error has a smaller total rank.
- parameters: values are taken by s^2 / (I + O), their gain per parameter. A value that does not fit is passed over.
  This is the greedy rule of the knapsack problem: no adapter of that size has an error that is smaller by more than the
  s^2 of the first value that was passed over.

Source: Kumaravelu, Gupta and Srijith, Post-Optimization Adaptive Rank Allocation for LoRA (PARA, arXiv 2604.27796):
one threshold over the singular values of all layers. The criteria of energy and parameters are ours.

Shape legend: M = modules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

Criterion = Literal["rank", "energy", "parameters"]


@dataclass(frozen=True)
class Cut:
    """What is asked for.

    Raises:
        ValueError: the amount is out of range.
    """

    criterion: Criterion
    amount: float
    """rank: mean rank per module, may be a fraction. energy: share of the sum of s^2, in (0, 1]. parameters: number of
    elements in both factors of all modules."""
    uniform: bool = False
    """Cut every module to the same rank instead (the baseline)."""

    def __post_init__(self) -> None:
        name, amount = f"--{self.criterion} {self.amount:g}", self.amount
        if not math.isfinite(amount) or amount <= 0:
            raise ValueError(f"{name} is not a number above 0: nothing would be left of the adapter")
        if self.criterion == "energy" and amount > 1:
            raise ValueError(f"{name} is above 1: give the share of the energy that is kept, such as 0.99")
        if self.criterion == "parameters" and amount != int(amount):
            raise ValueError(f"{name} is not a whole number of parameters")
        if self.criterion == "rank" and self.uniform and amount != int(amount):
            raise ValueError(f"{name} is not a whole number: with --uniform every module gets this very rank")


@dataclass(frozen=True)
class Spectrum:
    """The singular values of one module's update that are not zero, in descending order."""

    values: tuple[float, ...]
    cost: int
    """Parameters of one row: I + O."""

    @property
    def energy(self) -> float:
        """Sum of s^2, the squared Frobenius norm of the update."""
        return math.fsum(value * value for value in self.values)

    def kept(self, rank: int) -> float:
        """The share of the energy that the first ``rank`` values hold; 1 for a module without any."""
        total = self.energy
        return math.fsum(value * value for value in self.values[:rank]) / total if total else 1.0


def ranks_to_keep(spectra: Sequence[Spectrum], cut: Cut) -> list[int]:
    """The rank that every module keeps. Equal values are taken in the order of the modules.

    Values of zero carry nothing and are never kept. A budget above what the adapter has keeps all of it.

    Raises:
        ValueError: the budget is too small for a single row, or all values are zero.
    """
    if not any(spectrum.values for spectrum in spectra):
        raise ValueError(f"the update of all {len(spectra)} modules is zero: the adapter does nothing, train it first")
    return _uniform(spectra, cut) if cut.uniform else _by_threshold(spectra, cut)


def energy_kept(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> float:
    """The share of the energy of all modules that these ranks keep."""
    pairs = list(zip(spectra, ranks, strict=True))
    total = math.fsum(spectrum.energy for spectrum in spectra)
    if all(rank >= len(spectrum.values) for spectrum, rank in pairs):
        return 1.0
    return math.fsum(v * v for spectrum, rank in pairs for v in spectrum.values[:rank]) / total


def parameters_of(spectra: Sequence[Spectrum], ranks: Sequence[int]) -> int:
    """Number of elements in both factors of all modules at these ranks."""
    return sum(spectrum.cost * rank for spectrum, rank in zip(spectra, ranks, strict=True))


def _by_threshold(spectra: Sequence[Spectrum], cut: Cut) -> list[int]:
    # (gain, module), best first. Within a module the order is that of its values, so a prefix of them is kept.
    per_parameter = cut.criterion == "parameters"
    gains = [
        (value * value / spectrum.cost if per_parameter else value, module)
        for module, spectrum in enumerate(spectra)
        for value in spectrum.values
    ]
    order = [module for _, module in sorted(gains, key=lambda gain: (-gain[0], gain[1]))]
    if cut.criterion == "rank":
        taken = order[: _total_rank(cut.amount, len(spectra))]
    elif cut.criterion == "energy":
        taken = order[: _count_for_energy(sorted((v for s in spectra for v in s.values), reverse=True), cut.amount)]
    else:
        taken = _within_size(spectra, order, int(cut.amount))
    ranks = [0] * len(spectra)
    for module in taken:
        ranks[module] += 1
    return ranks


def _total_rank(mean: float, modules: int) -> int:
    total = math.floor(mean * modules + 1e-9)
    if total < 1:
        raise ValueError(f"--rank {mean:g} for {modules} modules is less than one row: give at least {1 / modules:.2g}")
    return total


def _count_for_energy(values: Sequence[float], share: float) -> int:
    """How many of the ``values`` (descending) are needed for that share of their energy."""
    wanted = share * math.fsum(value * value for value in values)
    sums = accumulate(value * value for value in values)
    enough = (count for count, total in enumerate(sums, 1) if total >= wanted)
    return len(values) if share == 1 else next(enough, len(values))


def _within_size(spectra: Sequence[Spectrum], order: Sequence[int], size: int) -> list[int]:
    _check_size(size, min(spectrum.cost for spectrum in spectra if spectrum.values), "one row of the smallest module")
    taken, left = [], size
    for module in order:
        # once a row of a module does not fit, none of its later rows does: they cost the same and less is left
        if spectra[module].cost <= left:
            taken.append(module)
            left -= spectra[module].cost
    return taken


def _uniform(spectra: Sequence[Spectrum], cut: Cut) -> list[int]:
    """min(q, its values) for every module, with one q: as asked, or the best that the other criteria allow."""
    most = max(len(spectrum.values) for spectrum in spectra)
    levels = [[min(q, len(spectrum.values)) for spectrum in spectra] for q in range(1, most + 1)]
    if cut.criterion == "rank":
        return levels[min(int(cut.amount), most) - 1]
    if cut.criterion == "energy":
        return next((ranks for ranks in levels if energy_kept(spectra, ranks) >= cut.amount), levels[-1])
    _check_size(int(cut.amount), parameters_of(spectra, levels[0]), "one row of every module")
    return [ranks for ranks in levels if parameters_of(spectra, ranks) <= cut.amount][-1]


def _check_size(size: int, least: int, what: str) -> None:
    if size < least:
        raise ValueError(f"--parameters {size} is below {least}, the size of {what}: give at least {least}")
