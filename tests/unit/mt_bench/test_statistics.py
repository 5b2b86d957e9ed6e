"""Means equal FastChat's, uncertainty equals known formulas, pairs equal the recorded tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from mt_bench_goldens import Golden, own_golden
from salient_eval.mt_bench import agree, pairs, statistics
from salient_eval.mt_bench.pairs import Battle
from salient_eval.mt_bench.statistics import ScoreTable
from salient_eval.mt_bench.store import read_rows


def categories_of(golden: Golden) -> dict[int, str]:
    return {q.question_id: q.category for q in golden.questions.questions}


@pytest.mark.parametrize("name", ["judgments_single", "judgments_single_partial"])
def test_means_equal_show_result(golden: Golden, name: str) -> None:
    recorded = golden.read("show_result_single.json")[name]["tables"]
    tables = statistics.score_tables(read_rows(golden.folder / f"{name}.jsonl"))
    for turn, part in ((1, "first_turn"), (2, "second_turn")):
        for row in recorded[part]:
            assert np.mean(tables[row["model"]].select(turn=turn)) == pytest.approx(row["score"], rel=1e-12)
    for row in recorded["average"]:
        assert statistics.pooled_mean(tables[row["model"]].scores_QT) == pytest.approx(row["score"], rel=1e-12)
    total, unparsed = 2 * len(golden.questions.questions), sum(golden.unparsed)
    assert tables["model-c"].counts == {"graded": total - unparsed, "unparsed": unparsed}
    assert tables["model-c"].failure_rate == pytest.approx(unparsed / total)


def test_partial_answers_show_in_the_mean_of_turns_and_the_failure_count(golden: Golden) -> None:
    tables = statistics.score_tables(read_rows(golden.folder / "judgments_single_partial.jsonl"))
    scores_QT = tables["model-b"].scores_QT
    pooled, turns = statistics.pooled_mean(scores_QT), statistics.mean_of_turns(scores_QT)
    assert pooled is not None and turns is not None and abs(pooled - turns) > 0.1
    assert statistics.pooled_with_failures_as_lowest(scores_QT) < turns
    assert np.isnan(scores_QT[:, 1]).sum() == golden.lacking


def test_category_means_equal_pandas(golden: Golden) -> None:
    recorded = golden.read("per_category_means.json")
    tables = statistics.score_tables(read_rows(golden.folder / "judgments_single.jsonl"), categories_of(golden))
    for row in recorded["by_model_category"] + recorded["by_model_category_turn"]:
        scores = tables[row["model"]].select(row["category"], row.get("turn"))
        assert np.mean(scores) == pytest.approx(row["score"], rel=1e-12)


def test_clustered_error_is_larger_than_the_naive_one(golden: Golden) -> None:
    """Recorded for model-a with statsmodels, the clustered one without the small-sample factor."""
    scores_QT = statistics.score_tables(read_rows(golden.folder / "judgments_single.jsonl"))["model-a"].scores_QT
    naive = np.std(scores_QT, ddof=1) / np.sqrt(scores_QT.size)
    clustered, n = statistics.clustered_standard_error(scores_QT), len(scores_QT)
    assert clustered is not None and clustered > naive and n == len(golden.questions.questions)
    expected_naive, uncorrected, precision = golden.errors
    assert naive == pytest.approx(expected_naive, abs=precision)
    assert clustered * np.sqrt((n - 1) / n) == pytest.approx(uncorrected, abs=precision)


def test_clustered_errors_equal_statsmodels_with_its_correction_too() -> None:
    """Also where answers are missing (model-c)."""
    golden = own_golden()
    tables = statistics.score_tables(read_rows(golden.folder / "judgments_single.jsonl"))
    for model, errors in golden.read("stats_reference.json")["standard_errors"].items():
        assert statistics.clustered_standard_error(tables[model].scores_QT) == pytest.approx(errors["clustered"])


def test_clustered_error_is_the_error_of_question_means_when_nothing_is_missing() -> None:
    scores_QT = np.random.default_rng(0).normal(5.0, 2.0, (40, 2))
    means_Q = scores_QT.mean(axis=1)
    assert statistics.clustered_standard_error(scores_QT) == pytest.approx(np.std(means_Q, ddof=1) / np.sqrt(40))


def test_bootstrap_interval_agrees_with_the_clustered_error_and_is_seeded() -> None:
    generator = np.random.default_rng(1)
    scores_QT = generator.normal(5.0, 1.0, (80, 1)) + generator.normal(0.0, 1.0, (80, 2))
    interval = statistics.bootstrap_interval(scores_QT, ["all"] * 80)
    error = statistics.clustered_standard_error(scores_QT)
    assert interval is not None and error is not None
    assert interval == statistics.bootstrap_interval(scores_QT, ["all"] * 80)
    assert interval[1] - interval[0] == pytest.approx(2 * 1.96 * error, rel=0.08)
    assert interval[0] < scores_QT.mean() < interval[1]
    assert statistics.bootstrap_interval(np.array([[5.0, np.nan]]), ["all"]) is None


def test_resampling_stays_within_categories() -> None:
    strata = ["a"] * 3 + ["b"] * 5
    draws = statistics.resample(strata, 50, seed=0)
    assert draws.shape == (50, 8) and draws[:, :3].max() <= 2 and draws[:, 3:].min() >= 3


def table(model: str, scores_QT: np.ndarray) -> ScoreTable:  # type: ignore[type-arg]
    return ScoreTable(model, tuple(range(len(scores_QT))), ("math",) * len(scores_QT), scores_QT, {"graded": 1}, None)


def test_paired_difference_finds_what_is_there_and_nothing_else() -> None:
    generator = np.random.default_rng(2)
    base = generator.normal(5.0, 2.0, (60, 2))
    tables = {
        "base": table("base", base),
        "better": table("better", base + 0.8 + generator.normal(0, 0.5, base.shape)),
        "same": table("same", base + generator.normal(0, 0.5, base.shape)),
    }
    found = {(d.first, d.second): d for d in statistics.paired_differences(tables)}
    real, null = found["base", "better"], found["base", "same"]
    assert real.mean == pytest.approx(-0.8, abs=0.2) and real.high < 0 and real.p_holm < 0.01
    assert null.low < 0 < null.high and null.p_value > 0.05 and real.p_holm >= real.p_value


def test_sign_flip_is_exact_for_few_questions() -> None:
    assert statistics.sign_flip_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 8)
    assert statistics.sign_flip_p(np.zeros(5)) == 1.0


def test_differences_ignore_answers_that_one_model_lacks() -> None:
    one, two = np.full((4, 2), 5.0), np.full((4, 2), 3.0)
    two[0] = np.nan
    two[1, 1] = np.nan
    (difference,) = statistics.paired_differences({"one": table("one", one), "two": table("two", two)})
    assert difference.mean == 2.0 and difference.questions == 3


def test_holm() -> None:
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([]) == []


def test_pair_tables_equal_show_result(golden: Golden) -> None:
    recorded = golden.read("show_result_pair.json")
    summary = pairs.summarise_pairs(read_rows(golden.folder / "judgments_pair.jsonl"))
    checked = 0
    for case in recorded.values():
        if not isinstance(case, dict) or case.get("model_list") or "table" not in case:
            continue
        counts = pairs.pair_counts(summary.battles, case["baseline_model"])
        assert set(counts) == {row["model"] for row in case["table"]}
        for row in case["table"]:
            mine = counts[row["model"]]
            assert [mine.win, mine.loss, mine.tie] == [row["win"], row["loss"], row["tie"]]
            assert mine.rates() == pytest.approx({k: row[k] for k in mine.rates()})
            checked += 1
    assert checked >= 7


def test_pair_truth_table(golden: Golden) -> None:
    cases = golden.read("pair_truth_table.json")
    assert len(cases) == 16
    for case in cases:
        row = {"question_id": 1, "model_1": "aa", "model_2": "bb", "turn": 1, **case}
        summary = pairs.summarise_pairs([row])
        expected = case["show_result_win_loss_tie"]
        if isinstance(expected, str):
            assert summary.errors == 1 and not summary.battles
        else:
            counts = pairs.pair_counts(summary.battles)
            assert {m: [c.win, c.loss, c.tie] for m, c in counts.items()} == expected


def test_bradley_terry_equals_fastchats_without_a_penalty(golden: Golden) -> None:
    """compute_bt of its main branch, or the wheel's function without its penalty (the README there says which)."""
    recorded = golden.read("bradley_terry.json")
    summary = pairs.summarise_pairs(read_rows(golden.folder / "judgments_pair.jsonl"))
    assert len(summary.battles) == recorded["n_battles"]
    ratings = pairs.bradley_terry(summary.battles, anchor="model-a")
    names = {"fastchat_head_rating_systems_compute_bt", "without_penalty"} & recorded.keys()
    theirs, shrunk = (recorded[n]["ratings"] for n in (*names, "fastchat_0_2_36_compute_elo_mle_with_tie"))
    assert ratings.keys() == theirs.keys()
    for model, rating in ratings.items():
        assert rating == pytest.approx(theirs[model] - theirs["model-a"], abs=1e-4)
        assert shrunk[model] - shrunk["model-a"] == pytest.approx(rating, rel=0.02)
    intervals = pairs.bradley_terry_intervals(summary.battles, "model-a", draws=40)
    assert intervals["model-a"] == (0.0, 0.0) and intervals["model-b"][0] < ratings["model-b"] < intervals["model-b"][1]


def test_head_to_head_equals_the_recorded_counts(golden: Golden) -> None:
    recorded = golden.read("bradley_terry.json")["head_to_head"]
    battles = pairs.summarise_pairs(read_rows(golden.folder / "judgments_pair.jsonl")).battles
    found = pairs.head_to_head(battles)
    assert len(found) == 3
    for (first, second), counts in found.items():
        expected = recorded[f"{first} vs {second}"]
        assert [counts.win, counts.loss, counts.tie] == [expected[n] for n in ("win", "loss", "tie")]


def test_bradley_terry_refuses_what_has_no_maximum() -> None:
    with pytest.raises(ValueError, match="no finite"):
        pairs.bradley_terry([Battle(1, "a", "b", 1.0), Battle(2, "a", "b", 1.0)])
    assert pairs.bradley_terry([Battle(1, "a", "b", 0.5)]) == pytest.approx({"a": 0.0, "b": 0.0})


def test_flips_and_position() -> None:
    rows = [
        {"question_id": n, "model_1": "a", "model_2": "b", "turn": 1, "g1_winner": g1, "g2_winner": g2}
        for n, (g1, g2) in enumerate([("model_1", "model_2"), ("model_1", "model_1"), ("tie", "tie"), ("error", "tie")])
    ]
    summary = pairs.summarise_pairs(rows)
    assert (summary.matches, summary.errors, summary.flips) == (4, 1, 1)
    assert summary.flip_rate == pytest.approx(1 / 3) and summary.first_shown_rate == pytest.approx(3 / 4)
    intervals = pairs.win_rate_intervals(summary.battles)
    assert 0.0 <= intervals["a"][0] <= intervals["a"][1] <= 1.0


def test_repeats_are_averaged_and_their_spread_reported() -> None:
    rows = [{"question_id": 1, "model": "m", "turn": 1, "score": s, "repeat": n} for n, s in enumerate((4, 6, -1))]
    found = statistics.score_tables(rows)["m"]
    assert found.scores_QT[0, 0] == 5.0 and found.repeat_spread == pytest.approx(np.sqrt(2.0))
    assert found.counts == {"graded": 2, "unparsed": 1}


def votes_of(golden: Golden) -> tuple[agree.Votes, agree.Votes]:
    judge = agree.load_votes(golden.folder / "votes_gpt4_pair.json", "gpt-4")
    return judge, agree.load_votes(golden.folder / "votes_human.json", "expert")


def test_agreement_equals_fastchats(golden: Golden) -> None:
    recorded = golden.read("compute_agreement.json")
    judge, human = votes_of(golden)
    for name, votes in (("gpt4-pair vs human", (judge, human)), ("human vs human", (human, None))):
        for turn in (1, 2):
            found = agree.agreement(*votes, turn=turn, draws=20)
            counts = recorded[name]["counts"]
            assert [found.agree_with_ties, found.total_with_ties] == counts[f"turn{turn}_with_tie"]
            assert [found.agree_without_ties, found.total_without_ties] == counts[f"turn{turn}_no_tie"]
            assert found.kappa is not None and found.with_ties is not None and found.kappa < found.with_ties


def test_kappa_equals_scikit_learns() -> None:
    golden = own_golden()
    recorded = golden.read("stats_reference.json")["cohen_kappa"]
    judge, human = votes_of(golden)
    for name, votes in (("gpt4-pair vs human", (judge, human)), ("human vs human", (human, None))):
        for turn in (1, 2):
            found = agree.agreement(*votes, turn=turn, draws=20)
            assert found.kappa == pytest.approx(recorded[name][f"turn{turn}"], rel=1e-12)


def test_kappa_of_a_known_table() -> None:
    counts = np.array([[20.0, 5.0, 0.0], [10.0, 15.0, 0.0], [0.0, 0.0, 0.0]])
    assert agree.cohen_kappa(counts) == pytest.approx(0.4)
    assert agree.cohen_kappa(np.diag([7.0, 0.0, 0.0])) is None


def test_single_against_pair_and_stored_order_does_not_matter(tmp_path: Path) -> None:
    pair_rows = [
        {"question_id": 1, "model_1": "b", "model_2": "a", "turn": 1, "g1_winner": "model_2", "g2_winner": "model_2"}
    ]
    single_rows = [
        {"question_id": 1, "model": m, "turn": 1, "score": s, "judge": ["j", "p"]} for m, s in (("a", 8), ("b", 3))
    ]
    for name, rows in (("pair", pair_rows), ("single", single_rows)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = agree.load_votes(tmp_path / "pair"), agree.load_votes(tmp_path / "single")
    assert first == second == {(1, 1, "a", "b"): ["first"]}
    with pytest.raises(ValueError, match="no votes"):
        agree.load_votes(tmp_path / "single", "other-judge")
    assert agree.load_votes(tmp_path / "single", tie_margin=5.0) == {(1, 1, "a", "b"): ["tie"]}
