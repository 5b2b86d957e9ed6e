"""Influence of singular values on each other, without a graph and without an N x N matrix.

Shape legend: N = singular values, T = steps of the window, L = values that vary (kept and sorted), r, c = rows and
columns of one block.

The dependency graph of SalientLoRA has an edge i -> j if the correlation of both histories reaches ``beta`` and the
slope of j on i reaches ``gamma``. The slope is rho_ij sigma_j / sigma_i, where sigma is the deviation within the
window. Since rho_ij <= 1, an edge needs sigma_j >= gamma sigma_i. For gamma > 1 two things follow:

- sigma grows strictly along every edge, so there is no cycle, and the influence solves a triangular system;
- values whose sigmas lie within a factor gamma of each other (a band) have no edges among themselves.

So the values are sorted by sigma and solved band by band, from the largest sigma down. Each band takes a masked matrix
product with everything above it, done in blocks. Differs from the reference, which builds the N x N graph and searches
it for cycles to break. For gamma > 1, that search never finds one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from salient_ds.ranks import WorkShare

BLOCK_BYTES = 256 * 2**20
"""Default memory of one block and its temporaries."""

REFERENCE_EPSILON = 1e-15
"""What the released code adds to the denominators of correlation and slope."""

SATURATION = 1e300
"""Largest influence reported. Sums of saturated values stay finite."""

# Thresholds are lowered by this relative slack, which exceeds the rounding of a normalised float32 dot product. So a
# value that meets a threshold exactly is an edge (the code tests >=) on every device and with every block size. With
# strict edges, pairs this close to a threshold are decided in float64, without a slack, as the released code does.
_THRESHOLD_SLACK = 1e-6
# Bands are narrower than gamma by more than slack and rounding together, so no edge can lie inside a band.
_BAND_SLACK = 1e-5

# correlation and limit (float32), epsilon term (float32), two bools, the float64 copy for the accumulation
_BYTES_PER_PAIR = 4 + 4 + 4 + 2 + 8


def influence(
    window_NT: Tensor,
    beta: float,
    gamma: float,
    leaf: float,
    *,
    epsilon: float = 0.0,
    strict: bool = False,
    block_bytes: int = BLOCK_BYTES,
    share: WorkShare | None = None,
) -> Tensor:
    """Influence I_i = sum over edges i -> k of slope_ik I_k, and 1 without an edge (Ke et al., NeurIPS 2024).

    Histories are centred in float64 and multiplied in float32 (never TF32). Influences are accumulated in float64: they
    reach 1e24 and more, and saturate at 1e300.

    Args:
        window_NT: histories of all values, one row each. Rows that do not vary have no edges.
        beta: smallest correlation of an edge.
        gamma: smallest slope of an edge, above 1.
        leaf: influence *reported* for values without an outgoing edge: 1 in the paper, 0 in the released code.
            Either way they count as 1 for the values that point at them.
        epsilon: added to the denominators of correlation and slope: 1e-15 in the released code (it removes edges
            between histories whose sum of squares is about that small), else 0.
        strict: decide pairs within 1e-6 of a threshold in float64 and without a slack, as the released code does. This
            costs a float64 copy of the window. Otherwise they all are edges.
        block_bytes: memory for one block. All other memory is a few copies of the window.
        share: divides the blocks of every band over processes, which all call this with the same arguments. The result
            is the same bit for bit, because the blocks do not depend on who computes them. None: this process computes
            all blocks.

    Returns:
        float64 (N,), on the window's device.

    Raises:
        ValueError: gamma <= 1 (cycles become possible), or block_bytes too small for a single pair.
    """
    if gamma <= 1:
        raise ValueError(
            f"gamma={gamma:g} must be above 1: only then does the deviation grow along every edge, so that the "
            "graph has no cycle and the influence is defined (the paper uses 2)"
        )
    if block_bytes < _BYTES_PER_PAIR:
        raise ValueError(f"block_bytes={block_bytes} is below {_BYTES_PER_PAIR}, the memory for one pair")
    out_N = torch.full((window_NT.shape[0],), float(leaf), dtype=torch.float64, device=window_NT.device)
    with torch.no_grad(), full_precision_matmul(window_NT.device.type):
        graph = DependencyGraph.of(window_NT, beta, gamma, epsilon, strict)
        if len(graph.rows_L):
            out_N[graph.rows_L] = _solve(graph, leaf, block_bytes // _BYTES_PER_PAIR, share or WorkShare())
    return out_N


@dataclass(frozen=True)
class DependencyGraph:
    """The edges as a rule over the values that vary, in increasing order of deviation.

    i -> j iff rho_ij >= limit_ij; its slope is rho_ij sigma_j / (sigma_i + epsilon / sigma_i).
    """

    rows_L: Tensor
    """The values' rows in the window, int64."""
    unit_LT: Tensor
    """Centred histories of length 1, float32."""
    sigma_L: Tensor
    """Length of the centred history (square root of its sum of squares), float64."""
    sigma_cpu_L: Tensor
    beta: float
    gamma: float
    epsilon: float
    centred_LT: Tensor | None = None
    """Centred histories, float64; only for strict edges."""

    @classmethod
    def of(
        cls, window_NT: Tensor, beta: float, gamma: float, epsilon: float = 0.0, strict: bool = False
    ) -> DependencyGraph:
        """The graph of a window.

        Centring in float64 makes a constant history exactly zero. So it is left out reliably, without an epsilon.
        """
        centred_NT = window_NT.double()
        centred_NT = centred_NT - centred_NT.mean(1, keepdim=True)
        sigma_N = torch.linalg.vector_norm(centred_NT, dim=1)
        order_N = torch.argsort(sigma_N, stable=True)
        rows_L = order_N[sigma_N[order_N] > 0]
        sigma_L = sigma_N[rows_L]
        centred_LT = centred_NT[rows_L]
        unit_LT = (centred_LT / sigma_L[:, None]).float()
        return cls(
            rows_L,
            unit_LT,
            sigma_L,
            sigma_L.cpu(),
            beta=beta,
            gamma=gamma,
            epsilon=epsilon,
            centred_LT=centred_LT if strict else None,
        )

    def first_above(self, row: int) -> int:
        """Index of the first value that ``row`` could have an edge to. Those before it are too close to it."""
        reach = max(self.gamma * (1 - _BAND_SLACK), 1.0)
        bound = self.sigma_cpu_L[row] * reach
        return int(torch.searchsorted(self.sigma_cpu_L, bound, right=reach == 1.0))

    def bands(self) -> list[tuple[int, int]]:
        """Index ranges without edges inside, from the smallest deviation up. Each begins at an existing value."""
        found, start = [], 0
        while start < len(self.sigma_cpu_L):
            found.append((start, self.first_above(start)))
            start = found[-1][1]
        return found

    def limits(self, rows: slice, columns: slice) -> Tensor:
        """Both thresholds as a smallest correlation of an edge: max(beta, gamma sigma_i / sigma_j), (r, c) float32.

        Epsilon divides the correlation by 1 + e and adds e to sigma_i / sigma_j, with e = epsilon / (sigma_i sigma_j).
        """
        # relative to the first row, so that no factor leaves the range of float32
        unit = self.sigma_L[rows.start]
        inverse_c = (unit / self.sigma_L[columns]).float()
        limit_rc = torch.outer((self.gamma * self.sigma_L[rows] / unit).float(), inverse_c)
        if self.epsilon > 0:
            extra_rc = torch.outer((self.epsilon / (self.sigma_L[rows] * unit)).float(), inverse_c)
            limit_rc.add_(extra_rc, alpha=self.gamma)
            torch.maximum(limit_rc, extra_rc.mul_(self.beta).add_(self.beta), out=limit_rc)
        else:
            limit_rc.clamp_(min=self.beta)
        return limit_rc.mul_(1 - _THRESHOLD_SLACK)

    def _strictly(self, i_p: Tensor, j_p: Tensor) -> Tensor:
        """Whether the pairs i -> j are edges in float64: rho >= beta and slope >= gamma, (p,) bool."""
        assert self.centred_LT is not None
        product_p = (self.centred_LT[i_p] * self.centred_LT[j_p]).sum(1)
        squares_p = self.centred_LT[i_p].square().sum(1)
        rho_p = product_p / ((squares_p * self.centred_LT[j_p].square().sum(1)).sqrt() + self.epsilon)
        return (rho_p >= self.beta) & (product_p / (squares_p + self.epsilon) >= self.gamma)

    def correlations(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """rho where there is an edge and 0 elsewhere, (r, c) float32; and whether a row has any edge, (r,)."""
        rho_rc = self.unit_LT[rows] @ self.unit_LT[columns].T
        limit_rc = self.limits(rows, columns)
        edge_rc = rho_rc >= limit_rc
        if self.centred_LT is not None:
            close_rc = (rho_rc - limit_rc).abs_() <= 3 * _THRESHOLD_SLACK * limit_rc
            row_p, column_p = close_rc.nonzero(as_tuple=True)
            edge_rc[row_p, column_p] = self._strictly(row_p + rows.start, column_p + columns.start)
        rho_rc.masked_fill_(~edge_rc, 0.0)
        return rho_rc, edge_rc.any(1)


def _solve(graph: DependencyGraph, leaf: float, pairs: int, share: WorkShare) -> Tensor:
    """Influences of the sorted values (L,), by back-substitution over bands, ``pairs`` pairs of values at a time.

    Inside a band, no value depends on another. So its rows are divided over processes, and joined before the next band.
    """
    sigma_L = graph.sigma_L
    total = len(sigma_L)
    # In a sum, value j counts sigma_j / sigma_max * I_j, so that large or small deviations cannot make it overflow.
    scale_L = sigma_L / sigma_L[-1]
    denominator_L = scale_L + graph.epsilon / sigma_L / sigma_L[-1]
    value_L = torch.ones_like(sigma_L)
    leaf_L = torch.ones_like(sigma_L, dtype=torch.bool)
    height = max(1, int(pairs**0.5) // 2)
    for start, end in reversed(graph.bands()):
        blocks = list(range(start, end, height))
        for low in blocks[share.global_rank :: share.world_size]:
            rows = slice(low, min(low + height, end))
            sum_r = torch.zeros_like(sigma_L[rows])
            width = max(1, pairs // (rows.stop - low))
            for left in range(graph.first_above(low), total, width):
                columns = slice(left, min(left + width, total))
                rho_rc, found_r = graph.correlations(rows, columns)
                sum_r += rho_rc.double() @ (value_L[columns] * scale_L[columns])
                leaf_L[rows] &= ~found_r
            solved_r = (sum_r / denominator_L[rows]).clamp_(max=SATURATION)
            value_L[rows] = torch.where(leaf_L[rows], 1.0, solved_r)
        if share.world_size > 1:
            _join(value_L, leaf_L, [slice(low, min(low + height, end)) for low in blocks], share)
    return torch.where(leaf_L, leaf, value_L)


def _join(value_L: Tensor, leaf_L: Tensor, blocks: list[slice], share: WorkShare) -> None:
    """Give every process the rows of all blocks of a band. Process k mod world size has computed block k."""
    rows = slice(blocks[0].start, blocks[-1].stop)
    both = torch.stack([value_L[rows], leaf_L[rows].double()])
    for k, block in enumerate(blocks):
        if k % share.world_size != share.global_rank:
            both[:, block.start - rows.start : block.stop - rows.start] = 0.0
    share.combine(both)
    value_L[rows], leaf_L[rows] = both[0], both[1] > 0


@contextmanager
def full_precision_matmul(device_type: str) -> Iterator[None]:
    """Inside the context, products are true float32: no TF32, bf16 shortcut or autocast, whatever the run enables."""
    mkldnn: Any = torch.backends.mkldnn
    owners: list[Any] = [torch.backends.cuda.matmul, mkldnn.matmul]
    saved = [owner.fp32_precision for owner in owners]
    try:
        for owner in owners:
            owner.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for owner, precision in zip(owners, saved, strict=True):
            owner.fp32_precision = precision
