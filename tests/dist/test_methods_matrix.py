"""Method x ZeRO stage x {1, 2} processes: every cell starts, decides, repeats and resumes like plain torch does.

(SalientLoRA, whose pruned rows also leave A and B, has its own: test_parity.py, test_resume.py.)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import methods_worker
from tests.dist.plain_run import train_plain
from tests.dist.scenario import TOTAL_STEPS, Case
from tests.dist.test_parity import OFFLOAD, TINY_PARTITIONS, assemble, assert_factors
from tests.support.spawn import spawn, spawn_apart

# events after steps 5, 9 and 13: the checkpoint after step 7 holds values that have grown back
CUBIC = {"target_rank": 2, "interval": 4, "final_warmup": 4}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"name": "lora"},
    "lora-svd": {"name": "lora", "form": "svd", "rslora": True},
    "adalora": {"name": "adalora"} | CUBIC,
    "adalora-paper": {"name": "adalora", "preset": "paper"} | CUBIC,
    # events after steps 6, 11 and, the phase being over, 14
    "lora2": {"name": "lora2", "inner_width": 3} | CUBIC | {"interval": 5},
    "adalora-gate": {"name": "adalora", "score": "gate_fisher"} | CUBIC | {"interval": 5},
    "salientlora-gate": {
        "name": "salientlora",
        "score": "gate_fisher",
        "target_rank": 2,
        "window_initial": 3,
        "window_final": 5,
        "initial_warmup": 2,
        "final_warmup": 2,
    },
    "spectral": {"name": "spectral", "target_rank": 2, "score": "energy", "prune_at": [5, 9, 13]},
    "spectral-curvature": {"name": "spectral", "target_rank": 2, "score": "curvature", "prune_at": 6},
    # rotates after steps 6 and 10; the checkpoint after step 7 lies in a window
    "spectral-gate": {"name": "spectral", "target_rank": 2, "score": "gate_fisher", "window": 3, "prune_at": [9, 13]},
}
DECISIONS = {"spectral-curvature": 1, "spectral-gate": 4}
ALLOCATING = [name for name in METHODS if not name.startswith("lora-") and name != "lora"]
PLACES: dict[str, dict[str, Any]] = {
    "stage0": {"stage": 0},
    "stage1": {"stage": 1},
    "stage2": {"stage": 2},
    "stage3": {"stage": 3, "zero": TINY_PARTITIONS},
}
FEWER = {
    "lora-svd": ["stage0", "stage3"],
    "adalora-paper": ["stage0", "stage2"],
    "adalora-gate": ["stage3"],
    "salientlora-gate": ["stage2"],
    "spectral-curvature": ["stage1"],
    "spectral-gate": ["stage0", "stage2"],
}
CELLS = [(method, place) for method in METHODS for place in FEWER.get(method, PLACES)]
EXTRA = {
    ("adalora", "stage3, pieces of 40"): Case(
        3, zero=TINY_PARTITIONS | {"sub_group_size": 40}, method=METHODS["adalora"]
    ),
    ("adalora-paper", "stage3, offloaded"): Case(
        3, zero=TINY_PARTITIONS | {"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD},
        method=METHODS["adalora-paper"],
    ),
    ("lora2", "stage2, offloaded"): Case(2, zero={"offload_optimizer": OFFLOAD}, method=METHODS["lora2"]),
    ("spectral", "stage2, offloaded"): Case(2, zero={"offload_optimizer": OFFLOAD}, method=METHODS["spectral"]),
    ("spectral-gate", "stage3, pieces of 40"): Case(
        3, zero=TINY_PARTITIONS | {"sub_group_size": 40}, method=METHODS["spectral-gate"]
    ),
}  # fmt: skip
TWO = {(m, p): Case(method=METHODS[m], **PLACES[p]) for m, p in CELLS} | EXTRA
ONE = {(m, p): case for (m, p), case in TWO.items() if m not in FEWER and (m, p) not in EXTRA}
EVERYWHERE = [method for method in METHODS if method not in FEWER]
USUAL = {(m, p) for i, m in enumerate(EVERYWHERE) for j, p in enumerate(PLACES) if (i - j) % 2 == 0}
USUAL |= {(method, FEWER[method][-1]) for method in FEWER} | {
    ("adalora", "stage3, pieces of 40"),
    ("lora2", "stage2, offloaded"),
}
"""Cells of every run of the tests: every method, every stage. All others are slow."""
GROUPS = {
    "1": [key for key in ONE if key in USUAL],
    "2": [key for key in TWO if key in USUAL],
    "1, others": [key for key in ONE if key not in USUAL],
    "2, others": [key for key in TWO if key not in USUAL],
}
TARGET = 2 * 6  # q_proj, v_proj and down_proj of two layers

each_cell = pytest.mark.parametrize(
    ("group", "key"),
    [
        pytest.param(group, key, id="-".join((group, *key)), marks=[pytest.mark.slow] if len(group) > 1 else [])
        for group, keys in GROUPS.items()
        for key in keys
    ],
)


class Matrix(dict[str, Any]):
    """By group and cell: what every process reports. One start of processes per group, on demand."""

    def __init__(self, model: Path, folder: Path) -> None:
        super().__init__()
        self.model, self.folder = model, folder

    def __missing__(self, group: str) -> Any:
        self[group] = self._alone(group) if group[0] == "1" else self._in_twos(group)
        return self[group]

    def _alone(self, group: str) -> Any:
        halves = [GROUPS[group][::2], GROUPS[group][1::2]]
        places = [(self.model, [ONE[k] for k in keys], self.folder / f"{group}-{i}") for i, keys in enumerate(halves)]
        reports = spawn_apart(methods_worker.run, *places)
        return {key: [report] for half in zip(halves, reports, strict=True) for key, report in zip(*half, strict=True)}

    def _in_twos(self, group: str) -> Any:
        keys = GROUPS[group]
        reports = spawn(2, methods_worker.run, self.model, [TWO[k] for k in keys], self.folder / group, timeout=560)
        return {key: [report[i] for report in reports] for i, key in enumerate(keys)}


@pytest.fixture(scope="module")
def results(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    return Matrix(tiny_llama, tmp_path_factory.mktemp("matrix"))


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> dict[str, Any]:
    return {name: train_plain(Case(0, method=method), tiny_llama) for name, method in METHODS.items()}


@each_cell
def test_a_fresh_model_is_the_base(results: Matrix, group: str, key: tuple[str, str]) -> None:
    assert all(report["fresh"] for report in results[group][key])


@each_cell
def test_decisions_and_factors_are_those_of_plain_torch(
    results: Matrix, plain: dict[str, Any], group: str, key: tuple[str, str]
) -> None:
    expected, reports = plain[key[0]], results[group][key]
    for report in reports:
        assert report["whole"]["digests"] == [d.digest() for d in expected["decisions"]]
        assert report["whole"]["losses"] == pytest.approx(expected["losses"], rel=2e-4)
    masters = assemble([[report["whole"]] for report in reports], 0, "master")
    assert_factors(masters, expected["adapted"], 2e-3)


@each_cell
def test_two_runs_are_bitwise_equal(results: Matrix, group: str, key: tuple[str, str]) -> None:
    assert [report["repeat"] for report in results[group][key]] == [[]] * int(group[0])


@each_cell
def test_resumed_equals_uninterrupted(results: Matrix, group: str, key: tuple[str, str]) -> None:
    for report in results[group][key]:
        whole, again = report["whole"], report["again"]
        for name in ("losses", "digests", "lr"):
            assert whole[name] == again[name], name
        for mine, theirs in zip(whole["state"]["fragments"], again["state"]["fragments"], strict=True):
            for name in ("master", "exp_avg", "exp_avg_sq"):
                assert torch.equal(mine[name], theirs[name]), (name, mine["part"])
        for mine, theirs in zip(whole["state"]["copies"], again["state"]["copies"], strict=True):
            assert torch.equal(mine[4], theirs[4])


@each_cell
def test_final_budget(results: Matrix, group: str, key: tuple[str, str]) -> None:
    """Exactly the target; what was dropped is zero in master and copies, and only that."""
    plain_factors = key[0].startswith("spectral")
    for report in results[group][key]:
        if key[0] not in ALLOCATING:
            assert report["decisions"] == []
            continue
        final = report["decisions"][-1]
        assert len(report["decisions"]) == DECISIONS.get(key[0], 3)
        assert (final.total, final.budget, final.hold, final.step < TOTAL_STEPS) == (TARGET, TARGET, True, True)
        masks = final.mask_N.split([5] * 6)
        seen = 0
        for entry in report["whole"]["state"]["fragments"]:
            part = entry["part"]
            if part.factor == "E" or plain_factors:
                mask = of_elements(masks[part.module], part.factor, part.shape)
                assert torch.equal(entry["master"] != 0, mask[part.lo : part.lo + part.numel])
                seen += part.numel
        for module, factor, shape, lo, copy in report["whole"]["state"]["copies"]:
            if factor == "E" or plain_factors:
                assert torch.equal(copy != 0, of_elements(masks[module], factor, shape)[lo : lo + copy.numel()])
        assert seen or group[0] == "2"


def of_elements(mask_R: torch.Tensor, factor: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A mask over rows as one over all elements of a flattened factor."""
    return (mask_R if factor != "A" else mask_R.unsqueeze(1)).expand(shape).reshape(-1)


@each_cell
def test_export_of_the_end_and_of_the_middle(
    results: Matrix, plain: dict[str, Any], group: str, key: tuple[str, str]
) -> None:
    """The last checkpoint folds into pairs of the final ranks; rows that may grow back are still in force before."""
    expected = plain[key[0]]
    middle = [d for d in expected["decisions"] if d.step <= 7 and d.hold][-1:]
    ranks_then = middle[0].ranks(expected["adapted"].layout) if middle else [5] * 6
    final = expected["decisions"][-1:] or [None]
    ranks = final[0].ranks(expected["adapted"].layout) if final[0] is not None else [5] * 6
    for report in results[group][key]:
        assert report["exported_ranks"] == ranks_then
        assert [rank for rank, _ in report["exported"]] == [rank for rank in ranks if rank]
        adapters = [a for a, rank in zip(expected["adapted"].adapters.values(), ranks, strict=True) if rank]
        for (_, update_OI), adapter in zip(report["exported"], adapters, strict=True):
            x_II = torch.eye(adapter.in_features)
            adapter.eval()
            with torch.no_grad():
                dense_OI = (adapter(x_II) - adapter.base(x_II)).T
            assert (update_OI - dense_OI).norm() < 0.01 * dense_OI.norm()


@pytest.mark.parametrize("name", ALLOCATING)
def test_allocation_changes_the_run(plain: dict[str, Any], name: str) -> None:
    """The comparisons above would notice a method that does nothing: decisions differ between methods."""
    digests = {m: tuple(d.digest() for d in plain[m]["decisions"]) for m in METHODS}
    assert len(digests[name]) == DECISIONS.get(name, 3) and all(
        digests[name] != d for m, d in digests.items() if m != name
    )


def test_low_precision_statistics_have_the_scale_of_fp32(tiny_llama: Path) -> None:
    """The loss scale (65536 and more) is out of the gradient that a method sees, at any stage."""
    places = [("fp32", 2), ("bf16", 2), ("bf16", 3), ("fp16", 0), ("fp16", 2), ("fp16", 3)]
    slow = {"sigma_lr": 1.0}  # the faster values learn, the more rounding changes them
    cases = [Case(stage, precision, method=METHODS["adalora"], zero=TINY_PARTITIONS if stage == 3 else {}, train=slow)
             for precision, stage in places]  # fmt: skip
    reports = spawn(2, methods_worker.statistics_norm, tiny_llama, cases, timeout=300)
    sums = []
    for index, case in enumerate(cases):
        sharing = reports[:1] if case.stage == 0 else reports
        sums.append({k: sum(r[index].get(k, 0.0) for r in sharing) for k in ("sensitivity", "uncertainty")})
    for found in sums:
        for name, value in found.items():
            assert value == pytest.approx(sums[0][name], rel=0.1)
    assert sums[0]["sensitivity"] > 0
