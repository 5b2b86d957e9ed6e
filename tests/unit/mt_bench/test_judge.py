"""Whole judging runs: the protocol's matches, every fault, resume, limits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from mt_bench_helpers import answers_for, endpoint, judge, write_answer_file
from salient_eval.mt_bench.cache import ReplyCache
from salient_eval.mt_bench.client import JudgeClient
from salient_eval.mt_bench.cost import Budget, Price
from salient_eval.mt_bench.judge import Judging
from salient_eval.mt_bench.matches import Options
from salient_eval.mt_bench.questions import QuestionSet, load_question_set
from salient_eval.mt_bench.report import ReportOptions, build_report
from salient_eval.mt_bench.store import Answer, Layout, merge_judgments, read_rows
from scripted_judge import ScriptedJudge


def big_set(count: int = 80) -> QuestionSet:
    """As many questions as MT-Bench has, made from our own."""
    own = load_question_set("own")
    questions = tuple(
        own.questions[n % 16].model_copy(update={"question_id": 9001 + n, "turns": (f"first {n}", f"second {n}")})
        for n in range(count)
    )
    references = {q.question_id: ("r1", "r2") for q in questions}
    return replace(own, questions=questions, references=references)


def test_single_run_asks_each_question_once_and_a_second_run_none(judge_server: ScriptedJudge, tmp_path: Path) -> None:
    first, rows, _ = judge(judge_server.url, tmp_path, ("alpha", "beta"))
    assert first.asked == len(rows) == 16 * 2 * 2 and first.statuses == {"graded": 64}
    assert set(judge_server.requests.values()) == {1}
    second, again, _ = judge(judge_server.url, tmp_path, ("alpha", "beta"))
    assert second.asked == 0 and second.from_cache == 64 and again == rows
    assert judge_server.total == 64
    keys = ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    assert all(list(row)[:8] == keys for row in rows)
    assert rows[0]["judge"] == ["judge-x", "own-single-turn1"] and rows[0]["meta"]["model"] == "judge-x-0613"


def test_pairs_are_shown_in_both_orders(tmp_path: Path) -> None:
    def first_wins(body: dict) -> str:  # type: ignore[type-arg]
        return "Verdict: [[A]]"

    with ScriptedJudge(first_wins) as server:
        summary, rows, _ = judge(server.url, tmp_path, ("alpha", "beta"), mode="pair-all")
    assert summary.asked == 64 and len(rows) == 32
    assert {(r["g1_winner"], r["g2_winner"]) for r in rows} == {("model_1", "model_2")}
    assert all("alpha" in r["g1_user_prompt"].split("assistant B")[0] for r in rows)
    assert all("beta" in r["g2_user_prompt"].split("assistant B")[0] for r in rows)


def test_repeats_are_asked_and_stored_apart(judge_server: ScriptedJudge, tmp_path: Path) -> None:
    summary, rows, _ = judge(judge_server.url, tmp_path, repeats=3)
    assert summary.asked == 96 and Counter(r["repeat"] for r in rows) == {0: 32, 1: 32, 2: 32}


@pytest.mark.parametrize("fault", ["429", "429-after", "500", "503", "cut", "short", "html", "close"])
def test_no_fault_loses_a_verdict_or_judges_one_twice(judge_server: ScriptedJudge, tmp_path: Path, fault: str) -> None:
    judge_server.fault_for = lambda body, seen: fault if seen < 1 else None
    summary, rows, _ = judge(judge_server.url, tmp_path)
    assert summary.statuses == {"graded": 32} and len(rows) == 32
    assert set(judge_server.answered.values()) == {1} and len(judge_server.answered) == 32


def test_a_flood_of_mixed_faults(judge_server: ScriptedJudge, tmp_path: Path) -> None:
    kinds = ["429", "500", "close", "cut", "429-after", "html", "503"]
    judge_server.fault_for = lambda body, seen: kinds[(len(str(body)) + seen) % 7] if seen < 4 else None
    summary, rows, _ = judge(judge_server.url, tmp_path, ("alpha", "beta"), concurrency=16)
    assert summary.statuses == {"graded": 64}
    assert judge_server.peak <= 16 and set(judge_server.answered.values()) == {1}


def test_timeouts_are_retried(judge_server: ScriptedJudge, tmp_path: Path) -> None:
    judge_server.faults = {0: "timeout", 3: "timeout"}
    summary, rows, _ = judge(judge_server.url, tmp_path, changes={"timeout_s": 0.6})
    assert summary.statuses == {"graded": 32}


def test_null_and_unreadable_replies_are_counted_not_scored(judge_server: ScriptedJudge, tmp_path: Path) -> None:
    judge_server.faults = {0: "null", 1: "garble"}
    summary, rows, _ = judge(judge_server.url, tmp_path, concurrency=1)
    assert summary.statuses == {"graded": 30, "failed": 1, "unparsed": 1}
    bad = [r for r in rows if r["status"] != "graded"]
    assert [r["score"] for r in bad] == [-1, -1] and any("content_filter" in r["reason"] for r in bad)
    summary, rows, _ = judge(judge_server.url, tmp_path)
    assert summary.asked == 0 and summary.statuses["graded"] == 30
    summary, rows, _ = judge(judge_server.url, tmp_path, ask_again=True)
    assert summary.asked == 2 and summary.statuses == {"graded": 32}


def test_what_never_answers_fails_alone_and_is_asked_again_next_time(
    judge_server: ScriptedJudge, tmp_path: Path
) -> None:
    judge_server.fault_for = lambda body, seen: "500" if "a9003" in str(body) else None
    summary, rows, _ = judge(judge_server.url, tmp_path, changes={"max_attempts": 2})
    failed = [r for r in rows if r["status"] == "failed"]
    assert {(r["question_id"], r["turn"]) for r in failed} == {(9003, 1), (9003, 2)}
    assert all("HTTP 500" in r["reason"] for r in failed)
    judge_server.fault_for = lambda body, seen: None
    summary, rows, _ = judge(judge_server.url, tmp_path)
    assert summary.asked == 2 and summary.statuses == {"graded": 32}


@pytest.mark.parametrize("fault", ["quota", "401", "404"])
def test_hopeless_errors_stop_the_run_and_keep_what_there_is(
    judge_server: ScriptedJudge, tmp_path: Path, fault: str
) -> None:
    judge_server.faults = dict.fromkeys(range(10, 500), fault)
    summary, rows, _ = judge(judge_server.url, tmp_path, concurrency=4)
    assert summary.stopped and "HTTP" in summary.stopped
    assert judge_server.total <= 10 + 4, "nothing is asked after the first hopeless error"
    assert summary.statuses["graded"] == 10 and len(rows) == 32
    judge_server.faults = {}
    summary, rows, _ = judge(judge_server.url, tmp_path)
    assert summary.from_cache == 10 and summary.statuses == {"graded": 32}
    assert max(judge_server.answered.values()) == 1


def test_answers_that_are_none_are_not_sent(judge_server: ScriptedJudge, tmp_path: Path) -> None:
    own = load_question_set("own")
    given = answers_for(own, "alpha")
    given[9001] = Answer(9001, ("", "x"), ("empty", "ok"))
    given[9002] = Answer(9002, ("x", "ERROR"), ("ok", "failed"))
    given[9003] = Answer(9003, ("x", "cut he"), ("ok", "truncated"))
    summary, rows, _ = judge(judge_server.url, tmp_path, answers={"alpha": given})
    reasons = {(r["question_id"], r["turn"]): r["reason"] for r in rows if r["status"] == "failed"}
    assert reasons == {(9001, 1): "answer 1 empty", (9001, 2): "answer 1 empty", (9002, 2): "answer 2 failed",
                       (9003, 2): "answer 2 truncated"}  # fmt: skip
    assert judge_server.total == 28
    summary, rows, _ = judge(judge_server.url, tmp_path, answers={"alpha": given}, truncated=True)
    assert summary.asked == 1


def test_equal_answers_share_one_call(judge_server: ScriptedJudge, tmp_path: Path) -> None:
    same = answers_for(load_question_set("own"), "alpha")
    summary, rows, _ = judge(judge_server.url, tmp_path, answers={"alpha": same, "beta": same})
    assert summary.asked == 32 and len(rows) == 64


def test_max_cost_is_never_passed(judge_server: ScriptedJudge, tmp_path: Path) -> None:
    price = Price(30.0, 60.0)
    budget = Budget(price, 0.3, 2048)
    summary, rows, _ = judge(judge_server.url, tmp_path, budget=budget)
    assert "--max-cost" in summary.stopped and 0 < summary.asked < 32
    assert summary.dollars is not None and summary.dollars <= 0.3
    assert summary.statuses["graded"] == summary.asked
    with pytest.raises(ValueError, match="--price-prompt"):
        Budget(None, 1.0, 2048)


def test_dry_run_counts_without_asking(judge_server: ScriptedJudge, tmp_path: Path) -> None:
    own = load_question_set("own")
    with ReplyCache(tmp_path / "c.jsonl") as cache:
        run = Judging(own, {"alpha": answers_for(own, "alpha")}, endpoint(judge_server.url), cache, Options(repeats=2))
        estimate = run.estimate(Price(30.0, 60.0))
    assert judge_server.total == 0
    assert estimate["calls"] == 64 and estimate["completion_tokens_ceiling"] == 64 * 2048
    assert estimate["dollars"] < estimate["dollars_ceiling"]


def test_missing_answers_and_bad_options_are_named(judge_server: ScriptedJudge, tmp_path: Path) -> None:
    own = load_question_set("own")
    given = answers_for(own, "alpha")
    del given[9005]
    with pytest.raises(ValueError, match="alpha has no answer to questions .9005."):
        judge(judge_server.url, tmp_path, answers={"alpha": given})
    with pytest.raises(ValueError, match="pair-baseline"):
        Options(mode="pair-baseline")
    with pytest.raises(ValueError, match="nothing to compare"):
        judge(judge_server.url, tmp_path, mode="pair-all")


def test_memory_stays_bounded_for_80_questions_2_turns_8_threads(tmp_path: Path) -> None:
    """Replies of 50 kB: all 160 together are 8 MB, what is held at once is far less."""
    text = "reason " * 7_000

    with ScriptedJudge(lambda body: f"{text} Rating: [[7]]") as server:
        server.keep_bodies = False
        tracemalloc.start()
        questions = big_set()
        target = endpoint(server.url)
        with ReplyCache(tmp_path / "cache.jsonl") as cache:
            run = Judging(questions, {"m": answers_for(questions, "m")}, target, cache, Options(concurrency=8))
            summary = run.run(JudgeClient(target))
            merge_judgments(tmp_path / "out.jsonl", run.rows(summary))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert summary.asked == 160 and summary.statuses == {"graded": 160} and server.peak <= 8
    assert (tmp_path / "out.jsonl").stat().st_size > 7_500_000
    assert peak < 5_000_000, f"peak {peak / 1e6:.1f} MB"


PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import conftest
from pathlib import Path
from mt_bench_helpers import endpoint
from salient_eval.mt_bench import judge, cache, client, questions, store
url, folder = sys.argv[2], Path(sys.argv[3])
layout = store.Layout(folder, "salient_own")
own = questions.load_question_set("own")
target = endpoint(url)
answers = {m: store.load_answers(layout.answers(m)) for m in layout.models()}
with cache.ReplyCache(layout.cache(target.model)) as replies:
    run = judge.Judging(own, answers, target, replies, judge.Options(concurrency=4))
    summary = run.run(client.JudgeClient(target))
    store.merge_judgments(layout.judgments(target.model, "single"), run.rows(summary))
print(summary.asked, summary.from_cache, flush=True)
"""


def test_kill_9_and_resume_gives_the_same_report(judge_server: ScriptedJudge, tmp_path: Path) -> None:
    layout = Layout(tmp_path, "salient_own")
    for model in ("alpha", "beta"):
        write_answer_file(layout, load_question_set("own"), model)
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent), judge_server.url, str(tmp_path)]
    judge_server.delay_s = 0.05
    for enough in (8, 25):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        deadline = time.monotonic() + 60
        cache_file = layout.cache("judge-x")
        while not (cache_file.exists() and cache_file.read_bytes().count(b"\n") >= enough):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not layout.judgments("judge-x", "single").exists()
    judge_server.delay_s = 0.0
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    asked, from_cache = map(int, done.stdout.split())
    assert asked + from_cache == 64 and from_cache >= 25
    # A reply on its way when the process died never reached it: at most one a thread and kill is asked again.
    assert sum(judge_server.answered.values()) <= 64 + 2 * 4
    _, undisturbed, _ = judge(judge_server.url, tmp_path / "other", ("alpha", "beta"))
    volatile = ("tstamp", "meta")
    trim = lambda rows: [{k: v for k, v in r.items() if k not in volatile} for r in rows]  # noqa: E731
    assert trim(list(read_rows(layout.judgments("judge-x", "single")))) == trim(undisturbed)
    other = Layout(tmp_path / "other", "salient_own")
    for model in layout.models():
        write_answer_file(other, load_question_set("own"), model)
    merge_judgments(other.judgments("judge-x", "single"), undisturbed)
    options = ReportOptions(draws=50)
    first, second = (build_report(place, "judge-x", "own", options) for place in (layout, other))
    assert first == second and first["single"]["models"][0]["average_pooled"]["graded"] == 32
