"""What is asked: FastChat's matches in its order, what it refuses, and what a question costs."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
from mt_bench_goldens import Golden, own_golden
from mt_bench_helpers import answers_for, judge
from salient_eval.mt_bench.cost import estimate_tokens
from salient_eval.mt_bench.matches import Match, Options, matches
from salient_eval.mt_bench.questions import load_question_set


def test_matches_are_fastchats_in_its_order(golden: Golden) -> None:
    lists, mt = golden.read("match_lists.json"), golden.questions
    models = ["model-a", "model-b", "model-c"]

    def shown(m: Match) -> list[object]:
        compared: object = m.models[0] if len(m.models) == 1 else list(m.models)
        return [m.question.question_id, compared, m.template.name, m.turn, m.reference is not None]

    assert [shown(m) for m in matches(mt, ["model-a"], Options())] == lists["single_1_model"]
    assert len(matches(mt, models, Options())) == lists["single_3_models_count"]
    baseline = matches(mt, models, Options(mode="pair-baseline", baseline="model-a"))
    every = matches(mt, models, Options(mode="pair-all"))
    assert len(baseline) == lists["baseline_3_models_count"] and len(every) == lists["all_pairs_3_models_count"]
    for mine, name in ((every, "all_pairs"), (baseline, "baseline")):
        theirs = lists.get(name) or lists[f"{name}_first10"]
        assert len(theirs) >= 10 and [shown(m) for m in mine[: len(theirs)]] == theirs


def test_what_fastchat_refuses_to_judge_is_refused(tmp_path: Path) -> None:
    """And nothing else: its check_data was run with each answer and each reference left out."""
    own, refused = load_question_set("own"), own_golden().read("check_data.json")
    complete = answers_for(own, "model-a")
    for question in own.questions:
        number, key = question.question_id, str(question.question_id)
        assert refused["answer"][key] is not None
        given = {n: answer for n, answer in complete.items() if n != number}
        with pytest.raises(ValueError, match=f"model-a has no answer to questions .{number}."):
            judge("http://127.0.0.1:1/v1", tmp_path, answers={"model-a": given})
        lacking = replace(own, references={n: r for n, r in own.references.items() if n != number})
        with pytest.raises(ValueError, match=key) if refused["reference"][key] else contextlib.nullcontext():
            matches(lacking, ["model-a"], Options())


def test_token_estimate_of_recorded_prompts_is_close(golden: Golden) -> None:
    cases = [c for c in golden.read("judge_requests.json") if c["kind"] == "single"]
    mean = sum(estimate_tokens(c["request"]["messages"]) for c in cases) / len(cases)
    low, high = golden.tokens
    assert low < mean < high


def test_token_ceiling_is_above_the_count_of_every_prompt() -> None:
    for case in own_golden().read("judge_requests.json"):
        request = case["request"] if case["kind"] == "single" else case["request_game1"]
        assert case["tokens"] < estimate_tokens(request["messages"], ceiling=True)
