"""One training, many ways: stages 0 to 3, offload, precisions, 1, 2 and 4 processes reach the same decisions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from salient_ds.adapters.inject import AdaptedModel
from salient_ds.ranks import Part
from tests.dist import scenario
from tests.dist.plain_run import train_plain
from tests.dist.scenario import SALIENT, TOTAL_STEPS, Case
from tests.support.spawn import spawn, spawn_apart

TINY_PARTITIONS = {"stage3_param_persistence_threshold": 0}
OFFLOAD = {"device": "cpu", "pin_memory": False}
FP32 = [
    Case(0),
    Case(1),
    Case(2),
    Case(3),
    Case(3, zero=TINY_PARTITIONS),
    Case(2, zero={"round_robin_gradients": True, "overlap_comm": True}),
    Case(3, zero=TINY_PARTITIONS | {"sub_group_size": 40}),
]
WHOLE = {"packing": "none", "compaction": "none"}
SHARDED = {"zero3": "sharded_base", "compaction": "none"}
LAID_OUT = [
    Case(2, speed=WHOLE),
    Case(3, speed=SHARDED),
    Case(3, zero=TINY_PARTITIONS, train={"activation_checkpointing": "all"}, speed=SHARDED),
    Case(3, zero=TINY_PARTITIONS | {"offload_param": OFFLOAD, "offload_optimizer": OFFLOAD}, speed=SHARDED),
    Case(2, train={"activation_checkpointing": "selective"}),
]
CHECKPOINTED = [Case(3, zero=TINY_PARTITIONS, train={"activation_checkpointing": "all"})]
OFFLOADED = [
    Case(2, zero={"offload_optimizer": OFFLOAD}),
    Case(3, zero=TINY_PARTITIONS | {"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}),
]
LOW = [
    Case(0, "bf16"),
    Case(1, "bf16", ds={"data_types": {"grad_accum_dtype": "fp32"}}),
    Case(2, "bf16"),
    Case(3, "bf16", zero=TINY_PARTITIONS),
    Case(0, "fp16"),
    Case(2, "fp16"),
    Case(3, "fp16", zero=TINY_PARTITIONS),
    Case(3, "bf16", speed=SHARDED),
    Case(3, "fp16", speed=SHARDED),
]
TWO_PROCESSES = FP32 + LAID_OUT + CHECKPOINTED + OFFLOADED + LOW
FOUR_PROCESSES = [Case(2), Case(3, zero=TINY_PARTITIONS)]


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> dict[str, Any]:
    return train_plain(Case(0), tiny_llama)


@pytest.fixture(scope="module")
def one(tiny_llama: Path) -> list[Any]:
    halves = spawn_apart(scenario.run, (tiny_llama, FP32[::2]), (tiny_llama, FP32[1::2]))
    return [[halves[index % 2][index // 2] for index in range(len(FP32))]]


@pytest.fixture(scope="module")
def two(tiny_llama: Path) -> list[Any]:
    return spawn(2, scenario.run, tiny_llama, TWO_PROCESSES)


@pytest.fixture(scope="module")
def four(tiny_llama: Path) -> list[Any]:
    return spawn(4, scenario.run, tiny_llama, FOUR_PROCESSES)


def assemble(results: list[Any], case: int, key: str) -> dict[tuple[int, str], torch.Tensor]:
    """Full tensors from all processes' fragments."""
    full: dict[tuple[int, str], torch.Tensor] = {}
    for process in results:
        for entry in process[case]["state"]["fragments"]:
            part: Part = entry["part"]
            numel = int(torch.tensor(part.shape).prod())
            target = full.setdefault((part.module, part.factor), torch.full((numel,), float("nan")))
            target[part.lo : part.lo + part.numel] = entry[key]
    return full


def assert_factors(masters: dict[tuple[int, str], torch.Tensor], adapted: AdaptedModel, tolerance: float) -> None:
    """Masters equal the factors of a model that was trained in plain torch."""
    for module, adapter in enumerate(adapted.adapters.values()):
        for factor, address in adapter.factors().items():
            value = address.parameter.detach().view(-1)
            torch.testing.assert_close(masters[module, factor], value, atol=tolerance, rtol=tolerance)


def assert_same_run(results: list[Any], index: int, plain: dict[str, Any]) -> None:
    expected = [(d.step, d.budget, d.mask_N) for d in plain["decisions"]]
    assert len(expected) >= 3
    for process in results:
        got = process[index]["decisions"]
        assert [(s, b) for s, b, _ in got] == [(s, b) for s, b, _ in expected]
        for (_, _, mine), (_, _, theirs) in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs)
        assert process[index]["losses"] == pytest.approx(plain["losses"], rel=2e-4)
    masters = assemble(results, index, "master")
    assert_factors(masters, plain["adapted"], 2e-3)


@pytest.mark.parametrize("index", range(len(FP32)), ids=str)
def test_one_process_equals_plain_torch(one: list[Any], plain: dict[str, Any], index: int) -> None:
    assert_same_run(one, index, plain)


@pytest.mark.parametrize("index", range(len(FP32 + LAID_OUT + CHECKPOINTED + OFFLOADED)), ids=str)
def test_two_processes_equal_plain_torch(two: list[Any], plain: dict[str, Any], index: int) -> None:
    assert_same_run(two, index, plain)


@pytest.mark.parametrize("index", range(len(FOUR_PROCESSES)), ids=str)
def test_four_processes_equal_plain_torch(four: list[Any], plain: dict[str, Any], index: int) -> None:
    assert_same_run(four, index, plain)


def test_decisions_that_wait_for_a_step_and_spare_the_vectors_equal_plain_torch(tiny_llama: Path) -> None:
    """The released code's policy: E alone, ungated, after the next step."""
    case = Case(2, method=SALIENT | {"preset": "reference", "window_final": 4})
    assert_same_run(spawn(2, scenario.run, tiny_llama, [case]), 0, train_plain(case, tiny_llama))


@pytest.mark.parametrize("index", range(len(TWO_PROCESSES)), ids=str)
def test_every_process_takes_the_identical_decision(two: list[Any], index: int) -> None:
    assert two[0][index]["digests"] == two[1][index]["digests"]
    assert len(two[0][index]["digests"]) >= 3


@pytest.mark.parametrize("index", range(len(TWO_PROCESSES)), ids=str)
def test_final_budget_is_exactly_the_target(two: list[Any], index: int) -> None:
    result = two[0][index]
    assert sum(result["ranks"]) == SALIENT["target_rank"] * len(result["layout"].modules)
    assert result["decisions"][-1][0] == TOTAL_STEPS - SALIENT["final_warmup"]


def ranks_of(part: Part) -> torch.Tensor:
    """Rank index of every element of a part."""
    at = torch.arange(part.lo, part.lo + part.numel)
    return at // int(torch.tensor(part.shape[1:]).prod()) if part.rank_axis == 0 else at % part.shape[1]


@pytest.mark.parametrize("index", range(len(TWO_PROCESSES)), ids=str)
def test_a_pruned_value_is_zero_everywhere(two: list[Any], index: int) -> None:
    """Master, both moments and every copy; and what was kept is not."""
    kept = 0
    for process in two:
        result = process[index]
        masks = result["decisions"][-1][2].split(list(result["layout"].ranks))
        for entry in result["state"]["fragments"]:
            dropped = ~masks[entry["part"].module][ranks_of(entry["part"])]
            assert {"exp_avg", "exp_avg_sq"} <= entry.keys()
            for key in ("master", "exp_avg", "exp_avg_sq"):
                assert not entry[key][dropped].any(), (key, entry["part"])
            kept += int(entry["master"][~dropped].count_nonzero())
        assert result["state"]["copies"]
        for module, factor, shape, lo, copy in result["state"]["copies"]:
            part = Part(factor, module, lo, copy.numel(), shape, 1 if factor == "B" else 0)
            assert not copy[~masks[module][ranks_of(part)]].any(), (factor, module)
    assert kept > 500


def test_low_precision_runs_train(two: list[Any]) -> None:
    """bf16 and fp16 start at the fp32 loss and prune on the same schedule."""
    for index in range(len(TWO_PROCESSES) - len(LOW), len(TWO_PROCESSES)):
        assert two[0][index]["losses"][0] == pytest.approx(two[0][0]["losses"][0], rel=2e-2)
        assert [d[:2] for d in two[0][index]["decisions"]] == [d[:2] for d in two[0][0]["decisions"]]
