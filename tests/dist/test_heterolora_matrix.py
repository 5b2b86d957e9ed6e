"""HeteroLoRA x ZeRO stage on two processes: searched, frozen and resumed like plain torch, probed without a trace."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist import heterolora_worker as worker
from tests.dist.plain_run import train_plain
from tests.dist.scenario import Case
from tests.dist.test_parity import OFFLOAD, TINY_PARTITIONS, assemble, assert_factors
from tests.support.spawn import spawn

# CONSTANT draws other modules at every event, so that they come and go
DRAWN = {"name": "heterolora", "proxy": "constant", "interval": 4, "interval_unit": "steps", "keep": 0.4,
         "mode": "separated", "tie_seed": 3}  # fmt: skip
SCORED = DRAWN | {"proxy": "grad_norm", "mode": "combined"}
COMMON: dict[str, Any] = {"train": {"weight_decay": 0.1, "max_grad_norm": 0.5, "max_steps": worker.STEPS},
                          "adapter": {"shortcuts": {"rank": 3}}}  # fmt: skip
CASES = {
    "stage0": Case(0, method=DRAWN, **COMMON),
    "stage1": Case(1, method=DRAWN, **COMMON),
    "stage2": Case(2, method=DRAWN, **COMMON),
    "stage3": Case(3, zero=TINY_PARTITIONS | {"sub_group_size": 2000}, method=DRAWN, adapter=COMMON["adapter"],
                   train=COMMON["train"] | {"activation_checkpointing": "all"}),
}  # fmt: skip
SEARCHED = {
    "scored": Case(2, method=SCORED, **COMMON),
    "bf16": Case(2, "bf16", method=SCORED | {"disabled_state": "decay"}, **COMMON),
    "offloaded": Case(
        3, zero=TINY_PARTITIONS | {"offload_optimizer": OFFLOAD, "offload_param": OFFLOAD}, method=SCORED, **COMMON
    ),
    "fp16": Case(3, "fp16", zero=TINY_PARTITIONS, method=SCORED | {"disabled_state": "reset"}, **COMMON),
}
BROKEN = [
    Case(3, zero=TINY_PARTITIONS, method=SCORED, **COMMON),
    Case(2, method=SCORED | {"proxy": "snip"}, **COMMON),
    Case(2, method=SCORED | {"proxy": "snip", "degenerate": "refuse"}, **COMMON),
]
MODULES, LINEARS, KEPT = 13, 6, 2 + 3  # floor(0.4 x 6) and round(0.4 x 7)
each_stage = pytest.mark.parametrize("key", CASES)
interrupted = pytest.mark.parametrize("key", [key for key in CASES if key != "stage1"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("heterolora")


@pytest.fixture(scope="module")
def two(tiny_llama: Path, folder: Path) -> dict[str, Any]:
    """By cell: what both processes report."""
    reports = spawn(2, worker.everything, tiny_llama, CASES | SEARCHED, folder, BROKEN, timeout=500)
    return {key: [report[key] for report in reports] for key in reports[0]}


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> dict[str, Any]:
    return train_plain(CASES["stage0"], tiny_llama)


@pytest.mark.parametrize("key", [*CASES, *SEARCHED])
def test_every_process_takes_the_same_decisions_within_the_budget(two: dict[str, Any], key: str) -> None:
    first, second = (report["watched"] for report in two[key])
    assert len(first["digests"]) == 3 and first["digests"] == second["digests"]
    for entry in first["history"]:
        assert entry["spent"] == entry["budget"] == sum(entry["on"]) == KEPT
    assert first["history"] == second["history"] and [e["step"] for e in first["history"]] == [0, 4, 8]
    on = first["history"][-1]["on"]
    assert first["masks"] == second["masks"] == [(is_on, is_on) for is_on in on]


@each_stage
def test_drawn_modules_come_and_go(two: dict[str, Any], key: str) -> None:
    for report in two[key]:
        choices = [entry["on"] for entry in report["watched"]["history"]]
        assert all(sum(on[:LINEARS]) == 2 for on in choices)
        assert len({tuple(on) for on in choices}) == 3
        assert len(set(report["watched"]["steps"])) > 2  # some have been off and on


@each_stage
def test_what_is_off_does_not_move(two: dict[str, Any], key: str) -> None:
    """Weights and both moments, bit for bit, at every step; what is on does."""
    frozen = [same for report in two[key] for same in report["watched"]["frozen"]]
    moved = [same for report in two[key] for same in report["watched"]["moved"]]
    assert all(frozen) and len(frozen) > worker.STEPS * (MODULES - KEPT)
    assert not any(moved) and len(moved) > worker.STEPS * KEPT


@each_stage
def test_training_is_that_of_one_optimizer_group_per_module(
    two: dict[str, Any], plain: dict[str, Any], key: str
) -> None:
    """AdamW that never sees a module while it is off, its bias correction included."""
    ranks = list(plain["adapted"].layout.ranks)
    choices = [[bool(mask_R.all()) for mask_R in d.mask_N.split(ranks)] for d in plain["decisions"]]
    for report in two[key]:
        watched = report["watched"]
        assert [entry["on"] for entry in watched["history"]] == choices
        assert watched["steps"] == plain["steps"]
        assert watched["losses"] == pytest.approx(plain["losses"], rel=2e-4)
    masters = assemble([[report["watched"]] for report in two[key]], 0, "master")
    assert_factors(masters, plain["adapted"], 1e-3)


@interrupted
@pytest.mark.parametrize("other", ["probed", "resumed"])
def test_a_probe_and_a_restart_leave_no_trace(two: dict[str, Any], key: str, other: str) -> None:
    """Losses under dropout, masters, moments, copies and random state are those of a run without, bit for bit."""
    for report in two[key]:
        whole, again = report["whole"], report[other]
        for name in ("losses", "history", "steps"):
            assert whole[name] == again[name], name
        assert torch.equal(whole["rng"], again["rng"])
        for mine, theirs in zip(whole["state"]["fragments"], again["state"]["fragments"], strict=True):
            for name in ("master", "exp_avg", "exp_avg_sq"):
                assert torch.equal(mine[name], theirs[name]), (name, mine["part"])
        for mine, theirs in zip(whole["state"]["copies"], again["state"]["copies"], strict=True):
            assert torch.equal(mine[4], theirs[4])
    assert two[key][0]["whole"]["losses"] != two[key][0]["watched"]["losses"]  # dropout was on


def test_scores_do_not_depend_on_the_number_of_processes(two: dict[str, Any], tiny_llama: Path, folder: Path) -> None:
    """Of the same checkpoint, by every proxy; one process at stages 0, 2 and 3, two at stage 2."""
    stages = [
        replace(CASES[key], adapter=CASES[key].adapter | {"dropout": 0.3}) for key in ("stage0", "stage2", "stage3")
    ]
    ((other, same, partitioned),) = spawn(1, worker.alone, tiny_llama, stages, folder / "stage2")
    first, second = (report["scores"] for report in two["stage2"])
    assert list(first) == list(worker.PROXIES)
    for proxy, score_M in first.items():
        assert torch.equal(score_M, second[proxy])
        small = 1e-6 * float(score_M.max())  # FISHER squares sums that may cancel
        for elsewhere in (same, other, partitioned):
            if proxy in elsewhere:
                torch.testing.assert_close(elsewhere[proxy], score_M, rtol=1e-6, atol=small)


@each_stage
def test_scores_are_those_of_plain_gradients(two: dict[str, Any], tiny_llama: Path, key: str) -> None:
    """Of the weights that training ended with, all modules on: those that are off as well."""
    masters = assemble([[report["watched"]] for report in two[key]], 0, "master")
    expected = worker.plain_scores(CASES[key], tiny_llama, masters)
    for proxy, score_M in expected.items():
        found_M = two[key][0]["watched"]["scores"][proxy]
        torch.testing.assert_close(found_M, score_M, rtol=1e-5, atol=1e-12)
        assert bool((found_M > 0).all()) == (proxy == "grad_norm" or bool((score_M > 0).all()))


@pytest.mark.parametrize("key", ["bf16", "fp16"])
def test_low_precision_scores_have_the_scale_of_fp32(two: dict[str, Any], key: str) -> None:
    """fp16's loss scale is out of them."""
    expected = torch.tensor(two["scored"][0]["watched"]["history"][0]["scores"])
    found = torch.tensor(two[key][0]["watched"]["history"][0]["scores"])
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0)


def test_what_becomes_of_modules_that_are_off(two: dict[str, Any]) -> None:
    """freeze also with everything offloaded; decay lets the optimizer go on; reset leaves B = 0."""
    for report in two["offloaded"]:
        assert all(report["watched"]["frozen"]) and not any(report["watched"]["moved"])
    assert not all(same for report in two["bf16"] for same in report["watched"]["frozen"])
    masters = assemble([[report["watched"]] for report in two["fp16"]], 0, "master")
    on = two["fp16"][0]["watched"]["history"][-1]["on"]
    assert [bool(masters[module, "B"].any()) for module in range(MODULES)] == on
    first = [torch.tensor(two[key][0]["watched"]["history"][0]["scores"]) for key in ("offloaded", "scored")]
    torch.testing.assert_close(first[0], first[1], rtol=1e-5, atol=0)


def test_a_probe_that_breaks_on_one_process_is_skipped_on_all(two: dict[str, Any]) -> None:
    for report in two["faults"]:
        assert report["kept"]
        first, second = report["history"]
        assert "on" in first and second["step"] == 4 and "not finite" in second["skipped"]
        assert all(torch.tensor(report["losses"]).isfinite())


def test_scores_that_cannot_rank_fall_back_or_are_refused(two: dict[str, Any]) -> None:
    for report in two["faults"]:
        assert report["fallback"] == "grad_norm"
        assert "method.proxy=grad_norm" in report["refused"] and "snip is 0" in report["refused"]
