"""A frozen network, and a teacher that differs from it by weight updates of known, unequal ranks.

Shape legend: I/O = in/out features of one matrix, r = planted rank, D = width of the residual stream, n = examples.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from salient_ds.adapters.inject import module_generator

from .planted_plan import ProblemSize, Regime

TEST_CHUNK = 2048


class Block(nn.Module):
    """h + down(gelu(up(h / rms(h)))), without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, h_nD: Tensor) -> Tensor:
        normed_nD = F.rms_norm(h_nD, h_nD.shape[-1:])
        out_nD: Tensor = h_nD + self.down(F.gelu(self.up(normed_nD)))
        return out_nD


class ResidualMLP(nn.Module):
    """A sequence of residual blocks. Weights are random with variance 1 / (in features)."""

    def __init__(self, size: ProblemSize, seed: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(size.width, size.hidden) for _ in range(len(size.planted) // 2)))
        for name, module in self.matrices().items():
            draw = module_generator(seed, f"weight of {name}")
            weight_OI = torch.randn(module.weight.shape, generator=draw)
            module.weight = nn.Parameter(weight_OI / module.in_features**0.5, requires_grad=False)

    def matrices(self) -> dict[str, nn.Linear]:
        return {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}

    def forward(self, x_nD: Tensor) -> Tensor:
        out_nD: Tensor = self.blocks(x_nD)
        return out_nD


@dataclass(frozen=True)
class Problem:
    """One teacher with its data. Everything is determined by size, regime and seed."""

    base: ResidualMLP
    updates: dict[str, Tensor]
    """Teacher's weight minus frozen weight, (O, I), by name of the matrix, in the order of the network."""
    ranks: dict[str, int]
    inputs_nD: Tensor
    targets_nD: Tensor
    """Outputs of the teacher plus noise."""
    test_inputs_nD: Tensor
    test_targets_nD: Tensor
    """Outputs of the teacher, without noise."""
    base_error: float
    """Mean squared error of the frozen network on the test set. All losses are in this unit."""


def make_problem(size: ProblemSize, regime: Regime, seed: int) -> Problem:
    """Build a random network and plant updates of ranks ``size.planted`` into it, in random order.

    The first two regimes have the same total energy (sum of squared singular values).

    * ``equal_energy``: every non-zero update has the same Frobenius norm, so that norms do not reveal ranks. A single
      direction of a high-rank update matters less.
    * ``equal_singular_value``: all planted singular values are equal. Frobenius norms grow with the square root of the
      rank.
    * ``power_law``: every update has full rank. Its singular values are c i^-a, with a from 0.3 to 1.5 and c from 0.35
      to 1 drawn for every matrix. There is no true rank; ``ranks`` is how many of a matrix's singular values are among
      the largest of all, as many as the budget allows. It is the best approximation of the updates, not of the outputs.
    """
    base = ResidualMLP(size, seed)
    order = torch.randperm(len(size.planted), generator=module_generator(seed, "order of the ranks")).tolist()
    ranks = {name: size.planted[place] for name, place in zip(base.matrices(), order, strict=True)}
    teacher, updates, spectra = copy.deepcopy(base), {}, {}
    for name, module in teacher.matrices().items():
        draw = module_generator(seed, f"update of {name}")
        spectra[name] = spectrum(size, regime, ranks[name], min(module.weight.shape), draw)
        update_OI = update_of(module.weight.shape, spectra[name], draw)
        module.weight = nn.Parameter(module.weight + update_OI, requires_grad=False)
        updates[name] = update_OI
    if regime == "power_law":
        ranks = best_ranks(spectra, size.total)
    inputs_nD = torch.randn(size.train_examples, size.width, generator=module_generator(seed, "inputs"))
    test_inputs_nD = torch.randn(size.test_examples, size.width, generator=module_generator(seed, "test inputs"))
    test_targets_nD = outputs(teacher, test_inputs_nD)
    base_error = float(F.mse_loss(outputs(base, test_inputs_nD), test_targets_nD))
    noise_nD = torch.randn(size.train_examples, size.width, generator=module_generator(seed, "noise"))
    targets_nD = outputs(teacher, inputs_nD) + size.noise * base_error**0.5 * noise_nD
    return Problem(
        base=base,
        updates=updates,
        ranks=ranks,
        inputs_nD=inputs_nD,
        targets_nD=targets_nD,
        test_inputs_nD=test_inputs_nD,
        test_targets_nD=test_targets_nD,
        base_error=base_error,
    )


def spectrum(size: ProblemSize, regime: Regime, rank: int, full: int, generator: torch.Generator) -> Tensor:
    """Singular values of an update, (rank,) or, for a power law, (full,)."""
    if regime == "power_law":
        exponent, largest = torch.rand(2, generator=generator) * torch.tensor([1.2, 0.65]) + torch.tensor([0.3, 0.35])
        return size.update_scale * largest * torch.arange(1, full + 1) ** -exponent
    occupied = sum(r > 0 for r in size.planted)
    energy = size.total / occupied / rank if regime == "equal_energy" and rank else 1.0
    return torch.full((rank,), size.update_scale * energy**0.5)


def best_ranks(spectra: dict[str, Tensor], total: int) -> dict[str, int]:
    """How many values of each spectrum are among the ``total`` largest."""
    lowest = torch.cat(list(spectra.values())).topk(total).values[-1]
    return {name: int((values >= lowest).sum()) for name, values in spectra.items()}


def update_of(shape: torch.Size, values_r: Tensor, generator: torch.Generator) -> Tensor:
    """Make a random (O, I) matrix with the non-zero singular values ``values_r``."""
    tall, wide = shape
    left_Or = torch.linalg.qr(torch.randn(tall, len(values_r), generator=generator)).Q
    right_Ir = torch.linalg.qr(torch.randn(wide, len(values_r), generator=generator)).Q
    return left_Or * values_r @ right_Ir.T


@torch.no_grad()
def outputs(model: nn.Module, inputs_nD: Tensor) -> Tensor:
    return torch.cat([model(chunk_nD) for chunk_nD in inputs_nD.split(TEST_CHUNK)])


def held_out_loss(model: nn.Module, problem: Problem) -> float:
    """Mean squared error against the noiseless teacher, relative to that of the frozen network (1: nothing learned)."""
    return float(F.mse_loss(outputs(model, problem.test_inputs_nD), problem.test_targets_nD)) / problem.base_error


def update_error(updates: dict[str, Tensor], problem: Problem) -> float:
    """Squared distance of a student's updates (O, I) from the planted ones, divided by the planted energy."""
    distance = sum(float((updates[name] - planted).square().sum()) for name, planted in problem.updates.items())
    return distance / sum(float(planted.square().sum()) for planted in problem.updates.values())
