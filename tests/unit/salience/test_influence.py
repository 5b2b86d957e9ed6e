"""The banded solve equals the plain recursion, whatever the block size, scale and device settings."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from salient_ds.salience import influence as module
from salient_ds.salience.influence import DependencyGraph, full_precision_matmul, influence
from tests.unit.salience.plain import (
    KINDS,
    CycleError,
    plain_edges,
    plain_influence,
    random_window,
    without_borderline,
)

PAIR = module._BYTES_PER_PAIR


@pytest.mark.parametrize("gamma", [1.1, 1.5, 2.0])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_plain_recursion(kind: str, gamma: float) -> None:
    edges = 0
    for seed, steps in enumerate([2, 3, 10, 60, 200]):
        window_NT = without_borderline(random_window(kind, 50, steps, seed), 0.9, gamma)
        edges_NN = plain_edges(window_NT, 0.9, gamma)
        edges += int((edges_NN > 0).sum())
        leaf = float(seed % 2)
        expected_N = plain_influence(edges_NN, leaf)
        # 1 and 20 pairs split bands and rows, 200 pairs some, the default none
        for pairs in (1 if steps == 10 else 20, 200, module.BLOCK_BYTES // PAIR):
            found_N = influence(window_NT, 0.9, gamma, leaf, block_bytes=pairs * PAIR)
            torch.testing.assert_close(found_N, expected_N, rtol=5e-6, atol=0)
    assert edges > 50 or kind == "noise"


def test_reported_leaves_and_inner_nodes() -> None:
    ramp_T = torch.linspace(0, 1, 10)
    window_NT = torch.stack([ramp_T, 3 * ramp_T, 9 * ramp_T, torch.zeros(10), -ramp_T])
    # 0 -> 1 (3), 0 -> 2 (9), 1 -> 2 (3); rows 2, 3, 4 have no edge
    assert influence(window_NT, 0.9, 2.0, 1.0).tolist() == pytest.approx([18, 3, 1, 1, 1])
    assert influence(window_NT, 0.9, 2.0, 0.0).tolist() == pytest.approx([18, 3, 0, 0, 0])


def test_a_value_that_meets_a_threshold_exactly_is_an_edge() -> None:
    for seed in range(20):
        row_T = random_window("walks", 1, 50, seed)[0]
        window_NT = torch.stack([row_T, 2 * row_T])
        assert influence(window_NT, 1.0, 2.0, 0.0).tolist() == pytest.approx([2, 0], rel=1e-6)
        just_below_NT = torch.stack([row_T, 2 * (1 - 1e-4) * row_T])
        assert influence(just_below_NT, 0.9, 2.0, 0.0).tolist() == [0, 0]


def test_constant_rows_take_part_in_no_edge() -> None:
    window_NT = random_window("common driver", 12, 7, 0)
    window_NT[3], window_NT[8] = 0.0, 0.1
    assert 3 not in DependencyGraph.of(window_NT, 0.9, 2.0).rows_L
    assert 8 not in DependencyGraph.of(window_NT, 0.9, 2.0).rows_L
    others = [i for i in range(12) if i not in (3, 8)]
    with_constants_N = influence(window_NT, 0.9, 2.0, 1.0)
    assert torch.equal(with_constants_N[others], influence(window_NT[others], 0.9, 2.0, 1.0))
    assert with_constants_N[[3, 8]].tolist() == [1, 1]


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**90])
def test_influence_has_no_scale(scale: float) -> None:
    window_NT = random_window("common driver", 50, 20, 1)
    assert torch.equal(influence(window_NT * scale, 0.9, 2.0, 1.0), influence(window_NT, 0.9, 2.0, 1.0))


def test_epsilon_removes_edges_between_tiny_histories() -> None:
    window_NT = 3e-9 * random_window("trends", 40, 10, 3)
    expected_N = plain_influence(plain_edges(window_NT, 0.9, 2.0, 1e-15), 1.0)
    with_epsilon_N = influence(window_NT, 0.9, 2.0, 1.0, epsilon=1e-15)
    torch.testing.assert_close(with_epsilon_N, expected_N, rtol=5e-6, atol=0)
    assert (influence(window_NT, 0.9, 2.0, 1.0) > with_epsilon_N).any()


def test_epsilon_lowers_correlation_and_slope() -> None:
    ramp_T = torch.tensor([-1.0, 0.0, 1.0]) / 2**0.5  # sum of squares 1

    def edge(ratio: float, sum_of_squares: float) -> bool:
        window_NT = torch.stack([ramp_T, ratio * ramp_T]) * sum_of_squares**0.5
        found_N = influence(window_NT, 0.9, 2.0, 0.0, epsilon=1e-15)
        expected_N = plain_influence(plain_edges(window_NT, 0.9, 2.0, 1e-15), 0.0)
        torch.testing.assert_close(found_N, expected_N, rtol=5e-6, atol=0)
        return bool(found_N[0] > 0)

    # slope ratio / (1 + 1e-15 / ss), correlation 1 / (1 + 1e-15 / (ratio ss))
    assert edge(2.05, 1e-12)
    assert not edge(2.05, 2e-14), "slope 1.95, correlation 0.98"
    assert edge(50.0, 2e-16)
    assert not edge(50.0, 1e-16), "slope 4.5, correlation 0.83"


def test_huge_influences_keep_their_precision_and_saturate_finitely() -> None:
    ramp_T = torch.tensor([0.0, 1.0])
    # 60 levels of 6 equal values: the number of paths alone, about 7^59, leaves the range of float32
    window_NT = (2.0 ** torch.arange(60)[:, None] * ramp_T).repeat_interleave(6, 0)
    expected_N = plain_influence(plain_edges(window_NT, 0.9, 1.9), 1.0)
    assert expected_N.max() > 1e60
    torch.testing.assert_close(influence(window_NT, 0.9, 1.9, 1.0), expected_N, rtol=1e-5, atol=0)
    many_NT = (1.12 ** torch.arange(600)[:, None] * ramp_T).repeat_interleave(6, 0)
    saturated_N = influence(many_NT, 0.9, 1.1, 1.0)
    assert saturated_N.max() == module.SATURATION
    assert saturated_N.sum().isfinite()
    assert (saturated_N > 0).all()


def test_no_edge_inside_a_band_and_no_cycle_for_gamma_above_one() -> None:
    for kind in KINDS:
        for gamma in (1.1, 1.5, 2.0):
            window_NT = random_window(kind, 60, 10, 5)
            graph = DependencyGraph.of(window_NT, 0.9, gamma)
            everything = slice(0, len(graph.rows_L))
            edge_LL = graph.correlations(everything, everything)[0] > 0
            for start, end in graph.bands():
                assert not edge_LL[start:end, start:end].any(), (kind, gamma)
            assert not edge_LL.tril().any(), "an edge leads to a value of no larger deviation"


def test_for_gamma_of_one_the_plain_graph_does_have_cycles() -> None:
    """The counterpart: what the bands rely on fails as soon as gamma is not above 1."""
    window_NT = random_window("duplicates", 60, 10, 5)
    with pytest.raises(CycleError):
        plain_influence(plain_edges(window_NT, 0.9, 1.0 - 1e-9), 1.0)
    for gamma in (1.0, 0.5, -2.0):
        with pytest.raises(ValueError, match=rf"gamma={gamma:g} must be above 1"):
            influence(window_NT, 0.9, gamma, 1.0)


def test_gamma_barely_above_one() -> None:
    window_NT = without_borderline(random_window("common driver", 40, 10, 2), 0.9, 1 + 1e-7)
    expected_N = plain_influence(plain_edges(window_NT, 0.9, 1 + 1e-7), 1.0)
    torch.testing.assert_close(influence(window_NT, 0.9, 1 + 1e-7, 1.0), expected_N, rtol=5e-6, atol=0)


def test_blocks_stay_within_their_memory_and_hopeless_columns_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[tuple[int, int]] = []
    original = DependencyGraph.correlations

    def recording(self: DependencyGraph, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        blocks.append((rows.stop - rows.start, columns.stop - columns.start))
        return original(self, rows, columns)

    monkeypatch.setattr(DependencyGraph, "correlations", recording)
    window_NT = random_window("walks", 500, 10, 0)
    influence(window_NT, 0.9, 2.0, 1.0, block_bytes=1000 * PAIR)
    assert max(r * c for r, c in blocks) <= 1000
    assert sum(r * c for r, c in blocks) < 500 * 500 / 2
    blocks.clear()
    influence(window_NT / window_NT.double().std(1, keepdim=True).float(), 0.9, 2.0, 1.0)
    assert blocks == [], "values of equal deviation cannot depend on each other"
    with pytest.raises(ValueError, match="block_bytes=3 is below"):
        influence(window_NT, 0.9, 2.0, 1.0, block_bytes=3)


def test_degenerate_windows() -> None:
    assert influence(torch.zeros(0, 5), 0.9, 2.0, 1.0).shape == (0,)
    assert influence(torch.zeros(3, 5), 0.9, 2.0, 1.0).tolist() == [1, 1, 1]
    assert influence(torch.randn(3, 1), 0.9, 2.0, 0.0).tolist() == [0, 0, 0]


def test_products_are_float32_whatever_the_run_has_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    window_NT = random_window("common driver", 60, 50, 0)
    expected_N = influence(window_NT, 0.9, 1.5, 1.0)
    seen: set[str] = set()
    original = DependencyGraph.correlations

    def recording(self: DependencyGraph, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        seen.update([torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision])
        return original(self, rows, columns)

    monkeypatch.setattr(DependencyGraph, "correlations", recording)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        settings = (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
        assert settings == ("tf32", "bf16")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(influence(window_NT, 0.9, 1.5, 1.0), expected_N)
        assert seen == {"ieee"}
        with pytest.raises(KeyError), full_precision_matmul("cpu"):
            raise KeyError
        after = (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)
        assert after == settings
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
def test_llama_7b_at_rank_480_needs_less_than_8_gib() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    g = torch.Generator(device="cuda").manual_seed(0)
    count, steps = 32 * 7 * 480, 200
    drivers_KT = torch.randn(64, steps, generator=g, device="cuda").cumsum(1)
    chosen_N = torch.randint(0, 64, (count,), generator=g, device="cuda")
    amplitude_N1 = torch.exp(1.5 * torch.randn(count, 1, generator=g, device="cuda"))
    noise_NT = torch.randn(count, steps, generator=g, device="cuda")
    values_N = influence(amplitude_N1 * (drivers_KT[chosen_N] + 0.6 * noise_NT), 0.9, 2.0, 1.0)
    gib = torch.cuda.max_memory_allocated() / 2**30
    assert values_N.isfinite().all() and math.log10(float(values_N.max())) > 3
    assert gib < 8, f"{gib:.2f} GiB"


@pytest.mark.parametrize("size", [2, 3])
def test_work_divided_over_processes_gives_the_same_bits(size: int) -> None:
    """Threads stand for processes; the blocks are small, so that every band has several."""
    import threading

    from salient_ds.ranks import WorkShare

    window_NT = torch.randn(120, 6, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 2, 120)[:, None]
    window_NT[5] = 1.0  # does not vary
    alone = influence(window_NT, 0.4, 1.5, 1.0, block_bytes=22 * 400)
    barrier, parts, found = threading.Barrier(size, timeout=60), [None] * size, [None] * size
    joined = [0]

    def work(rank: int) -> None:
        def combine(tensor: torch.Tensor) -> None:
            parts[rank] = tensor.clone()
            barrier.wait()
            tensor.copy_(sum(parts))
            joined[0] += rank == 0
            barrier.wait()

        found[rank] = influence(window_NT, 0.4, 1.5, 1.0, block_bytes=22 * 400, share=WorkShare(rank, size, combine))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert joined[0] > 3 and alone.max() > 1
    for mine in found:
        assert torch.equal(mine, alone)


@pytest.mark.parametrize(("factor", "strict", "edge"), [
    (2.0, False, True), (2.0, True, True), (2 - 1e-6, False, True), (2 - 1e-6, True, False), (1.9999, False, False),
])  # fmt: skip
def test_edges_at_the_threshold(factor: float, strict: bool, edge: bool) -> None:
    """A slope of exactly gamma is an edge either way; one just below it only if edges are tolerant."""
    history_T = torch.tensor([1.0, 5.0, -2.0, 3.5, 0.25], dtype=torch.float64)
    window_NT = torch.stack([history_T, history_T * factor])
    found_N = influence(window_NT, 0.9, 2.0, 0.0, strict=strict)
    assert (float(found_N[0]) > 0) is edge


def test_strict_edges_are_those_of_the_released_formulas() -> None:
    """Away from thresholds nothing changes; at them, the float64 formulas decide."""
    draw = torch.Generator().manual_seed(3)
    base_NT = torch.randn(60, 12, generator=draw, dtype=torch.float64)
    window_NT = torch.cat([base_NT, base_NT * 2, base_NT * (2 - 1e-7)])
    tolerant_N, strict_N = (influence(window_NT, 0.9, 2.0, 1.0, strict=flag) for flag in (False, True))
    assert torch.equal(strict_N[60:], tolerant_N[60:])
    assert bool((strict_N[:60] < tolerant_N[:60]).all())
