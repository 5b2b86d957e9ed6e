"""AdaLoRA reproduces the published implementations (see adalora/README.md for what the files hold)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from salient_ds.adapters.orthogonality import OrthogonalityPenalty, gram_residual
from salient_ds.adapters.ranked_linear import SVDLinear
from salient_ds.methods.adalora.method import AdaLoRA
from salient_ds.methods.adalora.options import AdaLoRAConfig
from salient_ds.ranks import RankLayout
from salient_ds.salience.budget import AllocationPlan
from salient_ds.salience.cubic_budget import budget_at, cubic_schedule
from tests.unit.methods.replay import Replay, Values, svd_factors

FOLDER = Path(__file__).parent / "adalora"
RUNS = sorted(path.stem for path in FOLDER.glob("run_*.npz") if "run_f" not in path.stem)
SCHEDULES = sorted(path.stem for path in FOLDER.glob("schedule_*.npz"))
TOLERANCE = 2e-6
"""Largest relative difference of a smoothed value or score: a few units in the last place of float32."""

Golden = dict[str, NDArray[Any]]


def read(name: str) -> Golden:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def layout_of(golden: Golden) -> RankLayout:
    dims, rank = golden["dims"].tolist(), int(golden["r_init"])
    names = tuple(f"m.{k}" for k in range(len(dims)))
    return RankLayout(names, (rank,) * len(dims), tuple(d[0] for d in dims), tuple(d[1] for d in dims))


def step_of(golden: Golden, kind: str, step: int, suffix: str = "") -> Values:
    """Whole factors of one step, by (matrix, short name)."""
    found = {}
    for key in golden:
        if key.startswith(f"{kind}/") and step < len(golden[key]):
            _, module, factor = key.removesuffix(suffix).split("/")[1].split(".")
            value = torch.from_numpy(golden[key][step])
            found[int(module), factor.removeprefix("lora_")] = value.flatten() if factor == "lora_E" else value
    return found


def config_of(golden: Golden, **options: Any) -> AdaLoRAConfig:
    return AdaLoRAConfig(
        preset="reference",
        target_total=int(golden["target_total"]),
        initial_warmup=int(golden["init_warmup"]),
        final_warmup=int(golden["final_warmup"]),
        interval=int(golden["mask_interval"]),
        beta1=float(golden["beta1"]),
        beta2=float(golden["beta2"]),
        **options,
    )


def replay_of(golden: Golden, pieces: int, **options: Any) -> Replay:
    layout, config = layout_of(golden), config_of(golden, **options)
    total = int(golden["total_step"])
    return Replay(lambda: AdaLoRA(config, layout, total), layout, svd_factors(layout), pieces)


def assert_close(found: Values, expected: Values, what: str) -> None:
    for at, value in found.items():
        np.testing.assert_allclose(value, expected[at], rtol=TOLERANCE, atol=1e-30, err_msg=f"{what} {at}")


def test_all_files_are_there() -> None:
    assert (len(RUNS), len(SCHEDULES)) == (4, 3)


@pytest.mark.parametrize("pieces", [1, 3])
@pytest.mark.parametrize("name", RUNS)
def test_whole_run(name: str, pieces: int) -> None:
    """Smoothed values, weights and masks after every step, and every score and budget."""
    golden = read(name)
    replay = replay_of(golden, pieces)
    total, compared = int(golden["total_step"]), 0
    masks = dict(zip(golden["mask_steps"].tolist(), golden["masks"].astype(bool), strict=True))
    for s in range(total):
        after = replay.train_step(step_of(golden, "p_before", s), step_of(golden, "grad", s))
        for at, value in step_of(golden, "p_after", s).items():
            np.testing.assert_array_equal(after[at], value, err_msg=f"step {s} {at}")
        if s in masks:
            np.testing.assert_array_equal(replay.in_force.mask_N, masks[s], err_msg=f"step {s}")
        if statistics := replay.statistics():
            assert len(statistics["sensitivity"]) == 3 * len(golden["dims"])
            assert_close(statistics["sensitivity"], step_of(golden, "exp_avg_ipt", s), f"step {s} Ibar")
            assert_close(statistics["uncertainty"], step_of(golden, "exp_avg_unc", s), f"step {s} Ubar")
            compared += 1
    assert compared >= total - int(golden["final_warmup"])
    # the released code repeats the last decision at every step of the final phase; here it is taken once and held
    count = len(replay.decisions)
    assert [d.step - 1 for d in replay.decisions] == golden["mask_steps"][:count].tolist()
    assert [d.budget for d in replay.decisions] == golden["curr_rank"][golden["mask_steps"][:count]].tolist()
    assert (golden["masks"][count - 1 :] == golden["masks"][count - 1]).all()
    assert [d.hold for d in replay.decisions] == [False] * (count - 1) + [True]
    np.testing.assert_allclose(torch.stack(replay.scores), golden["scores"][:count], rtol=TOLERANCE)
    thresholds = golden["threshold"][golden["mask_steps"][:count]]
    np.testing.assert_allclose([d.threshold for d in replay.decisions], thresholds, rtol=TOLERANCE)


def test_the_moment_matters() -> None:
    """Shows that the comparison above can fail: with the weights before the step the smoothed values are others."""
    golden = read("run_a")
    replay = replay_of(golden, 1, moment="paper")
    replay.train_step(step_of(golden, "p_before", 0), step_of(golden, "grad", 0))
    replay.train_step(step_of(golden, "p_before", 1), step_of(golden, "grad", 1))
    with pytest.raises(AssertionError, match="Mismatch"):
        assert_close(replay.statistics()["sensitivity"], step_of(golden, "exp_avg_ipt", 1), "Ibar")


@pytest.mark.parametrize("name", ["run_d_zero_grad_module", "run_e_ties"])
def test_ties_keep_fewer_in_the_released_code_and_exactly_the_budget_here(name: str) -> None:
    golden = read(name)
    replay = replay_of(golden, 1, ties="exact")
    for s in range(int(golden["total_step"])):
        replay.train_step(step_of(golden, "p_before", s), step_of(golden, "grad", s))
    assert all(decision.total == decision.budget for decision in replay.decisions)
    kept = golden["masks"][: len(replay.decisions)].sum(1)
    fewer = [n < decision.budget for n, decision in zip(kept.tolist(), replay.decisions, strict=True)]
    assert any(fewer)
    for decision, mask, tied in zip(replay.decisions, golden["masks"], fewer, strict=False):
        assert tied or (decision.mask_N.numpy() == mask.astype(bool)).all()


def test_target_equal_to_the_initial_total() -> None:
    """The released code raises at its first allocation; here nothing is pruned, and nothing is observed."""
    golden = read("run_f_target_equals_init")
    assert "kthvalue" in str(golden["exception"])
    replay = replay_of(golden, 2)
    for s in range(7):
        before = step_of(golden, "p_before", s)
        after = replay.train_step(before, step_of(golden, "grad", s))
        assert all(torch.equal(after[at], value) for at, value in before.items())
    assert replay.decisions == [] and replay.statistics() == {}


def plan_of(golden: Golden) -> AllocationPlan:
    modules = int(golden["n_modules"])
    return AllocationPlan(
        total_steps=int(golden["total_step"]),
        initial_total=modules * int(golden["r_init"]),
        target_total=modules * int(golden["r_target"]),
        initial_warmup=int(golden["init_warmup"]),
        final_warmup=int(golden["final_warmup"]),
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_at_every_step(name: str) -> None:
    golden = read(name)
    plan = plan_of(golden)
    budgets = [budget_at(plan, s + 1) for s in range(plan.total_steps)]
    assert budgets == golden["curr_rank"].tolist()
    events = cubic_schedule(plan, int(golden["mask_interval"]))
    masked = np.flatnonzero(golden["mask_flag"]).tolist()
    assert [event.step - 1 for event in events] == masked[: len(events)]
    assert [event.total_rank for event in events] == golden["curr_rank"][masked[: len(events)]].tolist()
    end = plan.total_steps - plan.final_warmup
    assert masked[len(events) - 1 :] == list(range(masked[len(events) - 1], plan.total_steps))
    assert events[-1].step - 1 in (end, end + 1)


def test_the_printed_formula_is_another_one() -> None:
    golden = read("schedule_small")
    plan = plan_of(golden)
    first, last = plan.initial_warmup, plan.total_steps - plan.final_warmup
    assert golden["paper_eq14_literal"][first] > plan.initial_total
    assert golden["paper_eq14_literal"][last - 1] > budget_at(plan, last) + 0.5


def test_peft_run() -> None:
    """PEFT decides the same. Without a final warm-up its last cut does not stay; ours, the same cut, does."""
    golden = read("peft_run_b_tfinal0")
    layout, total = layout_of(golden), int(golden["total_step"])
    config = AdaLoRAConfig(
        preset="reference", target_rank=float(golden["target_r"]), initial_warmup=int(golden["tinit"]),
        final_warmup=int(golden["tfinal"]), interval=int(golden["deltaT"]), beta1=float(golden["beta1"]),
        beta2=float(golden["beta2"]),
    )  # fmt: skip
    replay = Replay(lambda: AdaLoRA(config, layout, total), layout, svd_factors(layout), 2)
    for s in range(total):
        before, grad = (step_of(golden, kind, s, ".default") for kind in ("p_before", "grad"))
        after = replay.train_step(before, grad)
        for at, value in step_of(golden, "p_after", s, ".default").items():
            np.testing.assert_array_equal(after[at], value, err_msg=f"step {s} {at}")
        if s:
            np.testing.assert_array_equal(replay.in_force.mask_N, golden["pattern"][s].astype(bool))
            assert replay.in_force.budget == golden["budget"][s]
    assert len(replay.decisions) == total - 1
    assert [d.hold for d in replay.decisions[-2:]] == [False, True]


def test_forward() -> None:
    golden = {key: torch.from_numpy(np.asarray(value)) for key, value in read("forward_and_orth").items()}
    base = nn.Linear(7, 5)
    adapter = SVDLinear(base, 3, float(golden["alpha"]) / float(golden["ranknum"] + golden["eps"]))
    with torch.no_grad():
        for parameter, key in ((base.weight, "W"), (base.bias, "b"), (adapter.lora_A, "A"), (adapter.lora_B, "B")):
            parameter.copy_(golden[key])
        adapter.lora_E.copy_(golden["E"].flatten())
        np.testing.assert_allclose(adapter(golden["x"]), golden["y"], rtol=1e-5, atol=1e-6)


def penalty_value(factors: list[tuple[Tensor, Tensor]], coefficient: float, form: Any) -> Tensor:
    penalty = OrthogonalityPenalty(len(factors), coefficient, form)
    penalty.arm(1.0, torch.device("cpu"))
    for slot, (A, B) in enumerate(factors):
        penalty.note(torch.tensor([slot]), 0, gram_residual(A, None, 0).norm().view(1))
        penalty.note(torch.tensor([slot]), 1, gram_residual(B, None, 1).norm().view(1))
    return penalty.value()


def test_penalty() -> None:
    golden = {key: torch.from_numpy(np.asarray(value)) for key, value in read("forward_and_orth").items()}
    one = [(golden["A"], golden["B"])]
    two = [(golden["two_A0"], golden["two_B0"]), (golden["two_A1"], golden["two_B1"])]
    found = penalty_value(one, 1.0, "mean_norm")
    np.testing.assert_allclose(found, golden["orth_one_module_weight1"], rtol=1e-6)
    found = penalty_value(two, 0.1, "mean_norm")
    np.testing.assert_allclose(found, golden["orth_two_modules_weight01"], rtol=1e-6)
    np.testing.assert_allclose(penalty_value(two, 1.0, "squared"), golden["paper_R_two"].sum(), rtol=1e-6)
