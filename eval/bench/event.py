"""Benchmark the influence solve of an allocation event: seconds and memory for several numbers of singular values.

    python eval/bench/event.py --sizes 1080,3456,13824,107520 --window 200 --reference

N = 107520 is LLaMA-7B with all 224 matrices at rank 480. ``--reference`` also times the published algorithm where N is
small enough, and compares the results. That algorithm uses a dense N x N matrix, a graph library's search for cycles
and recursion over edges.

Shape legend: N = singular values, T = steps of the window, K = common factors.
"""

from __future__ import annotations

if not __package__:
    import standalone

    __package__ = standalone.PACKAGE

import json
import resource
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from salient_ds.salience.influence import DependencyGraph, influence

from .timing import GIB, peak_gib, reset_peak, wait

BETA, GAMMA, LEAF = 0.9, 2.0, 1.0


def histories(num_values: int, window: int, seed: int, device: torch.device, factors: int = 64) -> Tensor:
    """Make histories (N, T) float32 with many dependencies at very different scales.

    Each value follows one of K random walks, plus noise, scaled by a log-normal amplitude. This gives groups of
    strongly correlated values whose standard deviations span orders of magnitude, like singular values in training.
    """
    draw = torch.Generator(device=device).manual_seed(seed)
    walks_KT = torch.randn(factors, window, generator=draw, device=device).cumsum(1)
    group_N = torch.randint(0, factors, (num_values,), generator=draw, device=device)
    amplitude_N = (1.5 * torch.randn(num_values, generator=draw, device=device)).exp()
    noise_NT = 0.6 * torch.randn(num_values, window, generator=draw, device=device)
    return amplitude_N[:, None] * (walks_KT[group_N] + noise_NT)


def published(window_NT: Tensor) -> Tensor:
    """Influence (N,) float64 as published: all slopes in one matrix, search for cycles, recursion over edges."""
    import networkx as nx

    centred_NT = window_NT.double().cpu()
    centred_NT = centred_NT - centred_NT.mean(1, keepdim=True)
    product_NN = centred_NT @ centred_NT.T
    square_N = product_NN.diagonal()
    correlation_NN = product_NN / (square_N[:, None] * square_N).sqrt()
    slope_NN = product_NN / square_N[:, None]
    slope_NN[(correlation_NN < BETA) | (slope_NN < GAMMA)] = 0
    graph = nx.from_numpy_array(slope_NN.numpy(), create_using=nx.DiGraph)
    while True:
        try:
            cycle = nx.find_cycle(graph)
        except nx.NetworkXNoCycle:
            break
        graph.remove_edge(*min(cycle, key=lambda edge: graph.edges[edge]["weight"]))
    known: dict[int, float] = {}

    def value(node: int) -> float:
        if node not in known:
            edges = graph.out_edges(node, data="weight")
            known[node] = sum(weight * value(other) for _, other, weight in edges) if edges else LEAF
        return known[node]

    sys.setrecursionlimit(max(sys.getrecursionlimit(), len(window_NT) + 1000))  # a path visits each value at most once
    return torch.tensor([value(node) for node in range(len(window_NT))], dtype=torch.float64)


def time_solve(
    num_values: int, window: int, repeats: int, device: torch.device
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Return (row of the table, window, influences) for one size. Every repetition gets new histories."""
    seconds = []
    for seed in range(repeats + 1):
        window_NT = histories(num_values, window, seed, device)
        reset_peak(device)
        wait(device)
        began = time.perf_counter()
        found_N = influence(window_NT, BETA, GAMMA, LEAF)
        wait(device)
        seconds.append(time.perf_counter() - began)
    peak = peak_gib(device)
    graph = DependencyGraph.of(window_NT, BETA, GAMMA)
    row = {
        "values": num_values, "window": window, "seconds": median(seconds[1:]), "seconds_first": seconds[0],
        "peak_gib": peak, "window_gib": window_NT.nbytes / GIB, "bands": len(graph.bands()),
        "largest_influence": float(found_N.max()),
    }  # fmt: skip
    return row, window_NT, found_N


def compare(row: dict[str, Any], window_NT: Tensor, found_N: Tensor) -> None:
    """Run the published algorithm, and add its time and its largest relative difference to ``row``."""
    began = time.perf_counter()
    expected_N = published(window_NT)
    row["reference_seconds"] = time.perf_counter() - began
    row["reference_error"] = float(((found_N.cpu() - expected_N).abs() / expected_N.abs().clamp(min=1e-300)).max())


def main(
    sizes: Annotated[str, typer.Option(help="Numbers of singular values, by commas.")] = "1080,3456,13824,107520",
    window: Annotated[int, typer.Option(min=2, help="Window length in steps.")] = 200,
    repeats: Annotated[int, typer.Option(min=1, help="Timed solves per size, after one warm-up.")] = 3,
    reference: Annotated[bool, typer.Option("--reference", help="Also the published way (needs networkx).")] = False,
    reference_limit: Annotated[int, typer.Option(help="Largest N for --reference.")] = 1080,
    device: Annotated[str, typer.Option(help="auto, cuda or cpu.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Time the influence solve of an allocation event."""
    on_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    where = torch.device("cuda" if on_gpu else "cpu")
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    rows = []
    for size in (int(item) for item in sizes.split(",")):
        row, window_NT, found_N = time_solve(size, window, repeats, where)
        if reference and size <= reference_limit:
            compare(row, window_NT, found_N)
        rows.append(row)
        text = ", ".join(
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
        )
        print(f"{name}: {text}", flush=True)
    if out is not None:
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        out.write_text(
            json.dumps({"device": name, "torch": torch.__version__, "host_peak_gib": host, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    typer.run(main)
