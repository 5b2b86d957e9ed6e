"""SalientLoRA's dependency analysis written down plainly: dense, float64, recursive. What the fast code must equal.

Shape legend: N = values, T = steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("noise", "walks", "common driver", "duplicates", "zeros", "tiny variance", "trends")


def random_window(kind: str, count: int, steps: int, seed: int) -> Tensor:
    """(N, T) float32 with amplitudes over several decades."""
    g = torch.Generator().manual_seed(seed)
    noise_NT = torch.randn(count, steps, generator=g)
    amplitude_N1 = torch.exp(2 * torch.randn(count, 1, generator=g))
    walks_NT = noise_NT.cumsum(1)
    if kind == "noise":
        return amplitude_N1 * noise_NT
    if kind == "walks":
        return amplitude_N1 * walks_NT
    if kind == "common driver":
        return amplitude_N1 * (walks_NT[:1] + 0.3 * noise_NT)
    if kind == "duplicates":
        few_NT = (amplitude_N1 * walks_NT)[torch.randint(0, max(1, count // 4), (count,), generator=g)]
        return few_NT * torch.randint(1, 6, (count, 1), generator=g) + torch.randn(count, 1, generator=g)
    if kind == "zeros":
        window_NT = amplitude_N1 * (walks_NT[:1] + 0.3 * noise_NT)
        window_NT[torch.rand(count, generator=g) < 0.3] = 0
        window_NT[:2] = 0.1
        return window_NT
    if kind == "tiny variance":
        return 1e-12 * amplitude_N1 * (walks_NT[:1] + 0.3 * noise_NT)
    assert kind == "trends"
    slopes_N1 = amplitude_N1 * torch.sign(torch.randn(count, 1, generator=g))
    return slopes_N1 * torch.linspace(0, 1, steps) + 1e-3 * amplitude_N1 * noise_NT


def correlations_and_slopes(window_NT: Tensor, epsilon: float = 0.0) -> tuple[Tensor, Tensor]:
    """Signed Pearson correlation and regression slope of column j on row i, both (N, N) float64; 0 for 0/0."""
    centred_NT = window_NT.double() - window_NT.double().mean(1, keepdim=True)
    products_NN = centred_NT @ centred_NT.T
    squares_N = centred_NT.square().sum(1)
    rho_NN = products_NN / ((squares_N[:, None] * squares_N[None]).sqrt() + epsilon)
    slope_NN = products_NN / (squares_N + epsilon)[:, None]
    return rho_NN.nan_to_num(0, 0, 0), slope_NN.nan_to_num(0, 0, 0)


def plain_edges(window_NT: Tensor, beta: float, gamma: float, epsilon: float = 0.0) -> Tensor:
    """Slope of every edge i -> j, 0 where there is none (N, N)."""
    rho_NN, slope_NN = correlations_and_slopes(window_NT, epsilon)
    return torch.where((rho_NN >= beta) & (slope_NN >= gamma), slope_NN, 0.0)


def without_borderline(window_NT: Tensor, beta: float, gamma: float, margin: float = 1e-5) -> Tensor:
    """The window without rows that have a pair so close to a threshold that rounding may decide."""
    rho_NN, slope_NN = correlations_and_slopes(window_NT)
    near_NN = ((rho_NN / beta - 1).abs() < margin) & (slope_NN > gamma * (1 - margin))
    near_NN |= ((slope_NN / gamma - 1).abs() < margin) & (rho_NN > beta * (1 - margin))
    return window_NT[~near_NN.any(1)]


class CycleError(Exception):
    """The graph has a cycle: the recursion has no end."""


def plain_influence(edges_NN: Tensor, leaf: float) -> Tensor:
    """I_i = sum_k edge_ik I_k with I = 1 for values without an edge, which are reported as ``leaf`` (N,) float64."""
    weights = edges_NN.tolist()
    solved: dict[int, float] = {}
    open_nodes: set[int] = set()

    def visit(i: int) -> float:
        if i in open_nodes:
            raise CycleError(f"node {i} reaches itself")
        if i not in solved:
            open_nodes.add(i)
            terms = [w * visit(k) for k, w in enumerate(weights[i]) if w != 0]
            solved[i] = sum(terms) if terms else 1.0
            open_nodes.remove(i)
        return solved[i]

    values_N = torch.tensor([visit(i) for i in range(len(weights))], dtype=torch.float64)
    return torch.where((edges_NN != 0).any(1), values_N, leaf)
