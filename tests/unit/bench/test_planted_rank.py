"""The planted teacher is what it says, the metrics are right on cases worked by hand, and a run can be trusted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from salient_eval.bench import planted_rank
from salient_eval.bench.plain_training import PlainTraining
from salient_eval.bench.planted_metrics import estimate, paired, random_recall, rank_scores
from salient_eval.bench.planted_plan import ARMS, ORACLE, REGIMES, Arm, ProblemSize, Regime, Training
from salient_eval.bench.planted_problem import held_out_loss, make_problem, update_error
from salient_eval.bench.planted_students import build_student
from salient_eval.bench.planted_summary import best_rates, findings, summarise
from salient_eval.bench.planted_train import steps, student_updates, train

from salient_ds.methods.increlora.method import IncreLoRA
from salient_ds.methods.table import methods

SMALL = ProblemSize(planted=(0, 1, 2, 5), width=16, hidden=20, train_examples=2048, test_examples=512)
SHORT = Training(steps=120, batch=64, initial_rank=6, window_initial=5, window_final=30)
BY_NAME = {arm.name: arm for arm in ARMS}


@pytest.mark.parametrize("regime", REGIMES)
def test_the_planted_ranks_are_exact(regime: Regime) -> None:
    problem = make_problem(SMALL, regime, 3)
    if regime == "power_law":
        assert sum(problem.ranks.values()) == SMALL.total
        spectra = {name: torch.linalg.svdvals(update_OI) for name, update_OI in problem.updates.items()}
        kept = [values[: problem.ranks[name]] for name, values in spectra.items()]
        left = [values[problem.ranks[name] :] for name, values in spectra.items()]
        assert float(torch.cat(kept).min()) > float(torch.cat(left).max())
        for values in spectra.values():  # a straight line in logarithms
            slopes = values.log().diff() / torch.arange(1, len(values) + 1).log().diff()
            torch.testing.assert_close(slopes, slopes[:1].expand(len(slopes)), rtol=1e-3, atol=1e-3)
        return
    assert sorted(problem.ranks.values()) == [0, 1, 2, 5]
    for name, update_OI in problem.updates.items():
        values = torch.linalg.svdvals(update_OI.double())
        rank = problem.ranks[name]
        assert int((values > 1e-5).sum()) == rank
        torch.testing.assert_close(values[:rank], values[:1].expand(rank), rtol=1e-5, atol=1e-6)


def test_regimes_differ_in_what_is_equal_and_agree_in_total_energy() -> None:
    energies = {}
    for regime in REGIMES:
        problem = make_problem(SMALL, regime, 0)
        energies[regime] = {problem.ranks[name]: float(u.square().sum()) for name, u in problem.updates.items()}
    assert energies["equal_energy"] == pytest.approx({0: 0, 1: 8 / 3, 2: 8 / 3, 5: 8 / 3})
    assert energies["equal_singular_value"] == pytest.approx({0: 0, 1: 1, 2: 2, 5: 5})


def test_seeds_deal_the_ranks_to_other_matrices() -> None:
    assert len({tuple(make_problem(SMALL, "equal_energy", seed).ranks.values()) for seed in range(6)}) > 1


def test_the_frozen_network_has_loss_1_and_the_teacher_loss_0() -> None:
    problem = make_problem(SMALL, "equal_energy", 0)
    assert held_out_loss(problem.base, problem) == pytest.approx(1.0)
    assert update_error({name: torch.zeros_like(u) for name, u in problem.updates.items()}, problem) == 1.0
    for name, module in problem.base.matrices().items():
        module.weight += problem.updates[name]
    assert held_out_loss(problem.base, problem) == pytest.approx(0.0, abs=1e-9)
    assert update_error(problem.updates, problem) == 0.0


def test_wrong_planted_ranks_are_refused() -> None:
    for planted in ((0, 0), (1, 2, 3), (1, 99), (1, 2)):
        with pytest.raises(ValueError, match="planted ranks"):
            ProblemSize(planted=planted, width=16, hidden=20)


def test_rank_scores_of_cases_worked_by_hand() -> None:
    perfect = rank_scores([0, 1, 5], [0, 1, 5])
    assert (perfect.precision, perfect.recall, perfect.mean_difference) == (1, 1, 0)
    assert perfect.spearman == pytest.approx(1)
    uniform = rank_scores([2, 2, 2], [0, 1, 5])
    assert (uniform.overlap, uniform.precision, uniform.recall, uniform.spearman) == (3, 0.5, 0.5, None)
    assert uniform.mean_difference == 2
    opposite = rank_scores([5, 1, 0], [0, 1, 5])
    assert opposite.spearman == pytest.approx(-1) and opposite.recall == pytest.approx(1 / 6)
    short = rank_scores([0, 1, 2], [0, 1, 5])
    assert short.precision == 1 and short.recall == 0.5
    assert rank_scores([0, 0, 0], [0, 1, 5]).precision is None


def test_estimate_is_the_t_interval_over_what_is_defined() -> None:
    found = estimate([1.0, None, 2.0, float("nan"), 3.0])
    assert found is not None and found.count == 3 and found.mean == 2
    # t(0.975, 2 degrees) = 4.302653 times the standard error 1 / sqrt(3)
    assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)
    assert found.side_of(10) == -1 and found.side_of(-10) == 1 and found.side_of(2.5) == 0
    assert estimate([None]) is None
    lonely = estimate([4.0])
    assert lonely is not None and lonely.low is None and lonely.side_of(0) == 0
    difference = paired([1.0, 2.0, None], [0.5, 1.5, 9.0])
    assert difference is not None and (difference.mean, difference.low, difference.count) == (0.5, None, 2)
    certain = paired([1.0, 2.0, 3.0], [0.5, 1.5, 2.5])
    assert certain is not None and (certain.low, certain.high) == (0.5, 0.5) and certain.side_of(0) == 1


def test_recall_by_lot() -> None:
    assert random_recall([2, 2], 2, 4) == pytest.approx(1)
    # one of four values is kept: it lies in the matrix of rank 2 half of the time
    assert random_recall([0, 2], 2, 1) == pytest.approx(0.25)


def test_no_method_goes_untested() -> None:
    """All but HeteroLoRA: it switches whole modules on and off and has no ranks to recover."""
    assert {arm.method for arm in ARMS} == set(methods()) - {"heterolora"}


def usable_arms() -> list[Arm]:
    return [arm for arm in ARMS if arm.method in methods()]


@pytest.mark.parametrize("arm", usable_arms(), ids=lambda arm: arm.name)
def test_a_fresh_student_is_the_frozen_network_and_its_budget_is_the_planted_total(arm: Arm) -> None:
    problem = make_problem(SMALL, "equal_energy", 1)
    student = build_student(arm, problem, SMALL, SHORT, 1)
    assert held_out_loss(student.model, problem) == pytest.approx(1.0, abs=1e-4)
    updates = student_updates(student, problem)
    assert all(float(update_OI.detach().abs().max()) < 1e-3 for update_OI in updates.values())
    if student.method.events:
        assert student.method.events[-1].total_rank == SMALL.total or arm.options.get("preset") == "reference"
    else:
        assert sum(student.adapted.layout.ranks) == SMALL.total


def test_the_true_ranks_beat_uniform_ones() -> None:
    results = {
        name: train(BY_NAME[name], SMALL, SHORT, "equal_singular_value", 0, 0.02) for name in (ORACLE, "svd-lora")
    }
    assert results[ORACLE]["recovered"] == results[ORACLE]["planted"]
    assert results["svd-lora"]["recovered"] == [2, 2, 2, 2]
    assert results[ORACLE]["loss"] < 0.5 * results["svd-lora"]["loss"] < 0.5
    assert results[ORACLE]["update_error"] < results["svd-lora"]["update_error"]


@pytest.mark.parametrize(
    "name", ["adalora", "lora2", "increlora", "salientlora-paper-released", "salientlora-reference-released"]
)
def test_a_run_ends_at_its_masks_and_is_repeatable(name: str) -> None:
    first, second = (train(BY_NAME[name], SMALL, SHORT, "equal_energy", 2, 0.02) for _ in range(2))
    assert first.pop("seconds") >= 0 and second.pop("seconds") >= 0
    assert first == second
    assert first["num_events"] > 1 and first["loss"] < 1
    assert sum(first["recovered"]) == SMALL.total or "reference" in name


def test_what_is_dropped_does_not_act() -> None:
    for name in ("adalora", "salientlora-paper-robust", "salientlora-reference-robust"):
        problem = make_problem(SMALL, "equal_energy", 0)
        student = build_student(BY_NAME[name], problem, SMALL, SHORT, 0)
        run = PlainTraining(student.adapted, student.method, student.optimizer(0.02))
        steps(run, student, problem, SHORT, 0)
        run.finish()
        for matrix, update_OI in student_updates(student, problem).items():
            live = run.ranks()[matrix]
            assert int((torch.linalg.svdvals(update_OI.double()) > 1e-5).sum()) <= live, (name, matrix)


def test_every_matrix_that_is_to_grow_is_scored() -> None:
    problem = make_problem(SMALL, "equal_energy", 0)
    student = build_student(BY_NAME["increlora"], problem, SMALL, SHORT, 0)
    assert isinstance(student.method, IncreLoRA)
    run = PlainTraining(student.adapted, student.method, student.optimizer(0.02))
    steps(run, student, problem, SHORT, 0)
    assert bool((student.method.smoothed_M2 > 0).all())


def test_a_diverged_run_is_a_value() -> None:
    result = train(BY_NAME["lora"], SMALL, replace(SHORT, clip=1e30), "equal_energy", 0, 1e30)
    assert result["loss"] is None and "loss of step" in result["error"]


def run_of(arm: str, seed: int, recovered: list[int], loss: float | None, lr: float = 0.01) -> dict[str, Any]:
    return {"arm": arm, "regime": "equal_energy", "seed": seed, "lr": lr, "planted": [0, 1, 5], "recovered": recovered,
            "loss": loss, "update_error": 0.5}  # fmt: skip


def test_summary_pairs_by_seed_and_findings_claim_no_more_than_intervals() -> None:
    runs = []
    for seed in range(3):
        shift = 0.1 * seed  # between seeds losses differ far more than between arms
        runs += [
            run_of(ORACLE, seed, [0, 1, 5], 0.1 + shift, 0.003), run_of("lora", seed, [2, 2, 2], 0.2 + shift),
            run_of("good", seed, [0, 1, 5], 0.11 + shift), run_of("blind", seed, [2, 2, 2 - seed], 0.2 + seed),
        ]  # fmt: skip
    rows = {row.arm: row for row in summarise(runs, [0.003, 0.01, 0.03])}
    assert rows[ORACLE].at_edge and not rows["good"].at_edge
    good = rows["good"].estimates["above_oracle"]
    assert good is not None and (good.mean, good.low) == pytest.approx((0.01, 0.01))
    text = findings(list(rows.values()), 6)
    assert any("Control: the true ranks reach a lower loss" in line for line in text)
    assert "Loss against lora, seed by seed: lower: good; not told apart: blind." in text
    assert "Loss against true-ranks, seed by seed: higher: good; not told apart: blind." in text
    assert "blind did not end at the budget of 6: its runs kept 6, 5, 4." in text


def test_the_best_rate_is_that_of_the_lowest_loss_that_exists() -> None:
    tuning = [run_of("a", 9, [], 0.3, 0.001), run_of("a", 9, [], 0.1, 0.01), run_of("a", 9, [], None, 0.1),
              run_of("b", 9, [], None, 0.01)]  # fmt: skip
    assert best_rates(tuning) == {("equal_energy", "a"): 0.01}


def test_a_record_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted_rank, "QUICK_SIZE", SMALL)
    monkeypatch.setattr(planted_rank, "QUICK_TRAINING", replace(SHORT, steps=40, window_final=10))
    with pytest.raises(SystemExit) as stop:
        planted_rank.main(arms=f"{ORACLE},lora,adalora", regimes="equal_energy", seeds=2, tuning_seed=9, lrs="1e-2",
                          steps=0, workers=1, quick=True, deadline=0, out=tmp_path, commit="abc")  # fmt: skip
    assert stop.value.code == 0
    (folder,) = tmp_path.iterdir()
    assert folder.name.split("_")[1:3] == ["planted-rank", "lora-adalora"]
    page = json.loads((folder / "result.json").read_text())
    assert [run["arm"] for run in page["runs"]] == [ORACLE, "lora", "adalora"] * 2 and page["commit"] == "abc"
    text = (folder / "README.md").read_text()
    assert "| adalora | 0.02 | 8 |" in text and "nothing to claim" in text
    for name in ("ranks_equal_energy.png", "spearman.png"):
        assert f"({name})" in text and (folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_deadline_leaves_runs_out_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        planted_rank.main(arms="lora", regimes="equal_energy", seeds=2, tuning_seed=9, lrs="1e-2", steps=5, workers=1,
                          quick=True, deadline=1e-9, out=tmp_path, commit="abc")  # fmt: skip
    assert stop.value.code == planted_rank.INCOMPLETE
    (folder,) = tmp_path.iterdir()
    assert "no time left" in (folder / "README.md").read_text()


@pytest.mark.parametrize("wrong", [{"arms": "lore"}, {"regimes": "same"}, {"tuning_seed": 1}, {"lrs": "0,x"}])
def test_wrong_options_are_usage_errors(
    wrong: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {"arms": "", "regimes": "equal_energy", "seeds": 2, "tuning_seed": 9, "lrs": "1e-2",
                               "steps": 5, "workers": 1, "quick": False, "deadline": 0, "out": tmp_path,
                               "commit": "abc"}  # fmt: skip
    with pytest.raises(SystemExit) as stop:
        planted_rank.main(**options | wrong)
    assert stop.value.code == planted_rank.USAGE_ERROR and "error:" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
