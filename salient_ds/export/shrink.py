"""Cuts a trained LoRA adapter to lower ranks: singular values first, then the decision, then the factors.

Each module is read twice. The first pass (:func:`plan_cut`) keeps its singular values and nothing else; the second
(``shrunk_folder.py``) writes its factors. One module is in memory at a time.

Shape legend: I = in features, O = out features, r = rank before, k = rank after.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from salient_ds.export.fold import AdapterFactors, LoraPair, fold
from salient_ds.export.streamed import Entry
from salient_ds.salience.factored_svd import factored_singular_values, factored_svd, numerical_rank
from salient_ds.salience.spectral_cut import Cut, Spectrum, energy_kept, parameters_of, ranks_to_keep


class LoraSource(Protocol):
    """An adapter, read one module at a time (:class:`~salient_ds.export.lora_folder.LoraFolder`, or a run)."""

    place: Path
    """Where it lies; nothing is written into it."""
    modules: list[str]
    embeddings: set[str]
    """The modules that are embeddings."""
    config: dict[str, Any]
    """Fields of adapter_config.json that do not concern ranks."""
    carried: list[Entry]
    """Tensors that are copied as they are."""
    companions: Path | None
    """A folder whose files, apart from weights, are copied: the tokenizer's, for example."""
    record: dict[str, Any]
    """What its salient_ds.json says; may be empty."""

    def dtype(self, module: str) -> torch.dtype:
        """The type in which factors of this module are written by default."""

    def read(self, module: str) -> AdapterFactors:
        """The factors of one module."""

    def read_carried(self, key: str) -> Tensor:
        """One of the tensors that are copied."""

    def sha256(self) -> dict[str, str]:
        """File name -> sha256, for the files that determine the adapter."""


@dataclass(frozen=True)
class ModuleCut:
    """What becomes of one module."""

    name: str
    shape: tuple[int, int]
    """(O, I)"""
    before: int
    after: int
    spectrum: Spectrum

    @property
    def kept(self) -> float:
        """Share of the module's energy that is kept."""
        return self.spectrum.kept(self.after)


@dataclass(frozen=True)
class Shrinkage:
    """The decision for all modules of an adapter."""

    cut: Cut
    modules: tuple[ModuleCut, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """Module -> rank after the cut."""
        return {module.name: module.after for module in self.modules}

    @property
    def energy_kept(self) -> float:
        """Share of the energy of all modules that is kept."""
        return energy_kept([m.spectrum for m in self.modules], [m.after for m in self.modules])

    @property
    def parameters(self) -> tuple[int, int]:
        """Elements of all factors before and after, without padding."""
        spectra = [m.spectrum for m in self.modules]
        return tuple(parameters_of(spectra, ranks) for ranks in  # type: ignore[return-value]
                     ([m.before for m in self.modules], [m.after for m in self.modules]))  # fmt: skip

    @property
    def keeps_everything(self) -> bool:
        """Whether no singular value but zeros was cut."""
        return all(m.after == len(m.spectrum.values) for m in self.modules)


def plan_cut(source: LoraSource, cut: Cut) -> Shrinkage:
    """The first pass: measure every module, and decide.

    Raises:
        ValueError: values are not finite, the adapter does nothing, or the budget is below one row.
    """
    measured = [_measure(source.read(name)) for name in source.modules]
    ranks = ranks_to_keep([spectrum for *_, spectrum in measured], cut)
    rows = zip(source.modules, measured, ranks, strict=True)
    return Shrinkage(cut, tuple(ModuleCut(n, shape, before, k, spec) for n, (shape, before, spec), k in rows))


def _measure(factors: AdapterFactors) -> tuple[tuple[int, int], int, Spectrum]:
    (_, wide), (tall, _) = factors.A.shape, factors.B.shape
    try:
        S_r = factored_singular_values(*_product(factors))
    except ValueError as error:
        raise ValueError(f"{factors.name}: {error}; save or fetch the adapter again") from None
    values = S_r[: numerical_rank(S_r, wide, tall)].tolist()
    return (tall, wide), factors.rank, Spectrum(tuple(values), wide + tall)


def _product(factors: AdapterFactors) -> tuple[Tensor, Tensor]:
    """A (r, I) and B (O, r), in float64, of live rows, with scale and singular values in B."""
    gain_r = torch.full((len(factors.mask),), factors.scaling, dtype=torch.float64)
    if factors.E is not None:
        gain_r = gain_r * factors.E.double()
    return factors.A[factors.mask].double(), (factors.B.double() * gain_r)[:, factors.mask]


def cut_factors(factors: AdapterFactors, rank: int) -> LoraPair | None:
    """The closest update of that rank, as two plain factors; None for rank 0.

    A module that keeps all its rows keeps its factors (with the scale folded in), so that it is the same to rounding.
    """
    if rank == 0 or rank == factors.rank:
        return fold(factors) if rank else None
    U_Or, S_r, V_rI = factored_svd(*_product(factors))
    every_k = torch.ones(rank, dtype=torch.bool)
    return fold(AdapterFactors(factors.name, V_rI[:rank], S_r[:rank], U_Or[:, :rank], every_k, 1.0))
