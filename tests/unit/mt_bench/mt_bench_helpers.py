"""Answers, endpoints and runs for the tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from salient_eval.mt_bench.cache import ReplyCache
from salient_eval.mt_bench.client import Endpoint, JudgeClient
from salient_eval.mt_bench.cost import Budget
from salient_eval.mt_bench.judge import Judging, Summary
from salient_eval.mt_bench.matches import Options
from salient_eval.mt_bench.questions import QuestionSet, load_question_set
from salient_eval.mt_bench.store import Answer, Layout, Row, load_answers, merge_judgments, write_answers


def endpoint(url: str, **changes: Any) -> Endpoint:
    return Endpoint(**{"base_url": url, "model": "judge-x", "timeout_s": 20.0, "backoff_s": 0.001, **changes})


def answers_for(questions: QuestionSet, model: str) -> dict[int, Answer]:
    return {
        q.question_id: Answer(
            q.question_id, (f"{model} says a{q.question_id}", f"{model} says b{q.question_id}"), ("ok", "ok")
        )
        for q in questions.questions
    }


def write_answer_file(layout: Layout, questions: QuestionSet, model: str, **changes: Any) -> None:
    """An answer file in FastChat's format."""
    rows = [
        {"question_id": q, "answer_id": f"{model}-{q}", "model_id": model,
         "choices": [{"index": 0, "turns": list(a.turns)}], "tstamp": 0.0, **changes}
        for q, a in answers_for(questions, model).items()
    ]  # fmt: skip
    write_answers(layout.answers(model), rows)


def judge(
    url: str,
    folder: Path,
    models: tuple[str, ...] = ("alpha",),
    questions: QuestionSet | None = None,
    answers: dict[str, dict[int, Answer]] | None = None,
    budget: Budget | None = None,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[Summary, list[Row], Judging]:
    """Judge the own questions (or others) and return the summary, the rows, and the run."""
    questions = questions or load_question_set("own")
    target = endpoint(url, **(changes or {}))
    client = JudgeClient(target)
    with ReplyCache(folder / "cache.jsonl") as cache:
        run = Judging(
            questions, answers or {m: answers_for(questions, m) for m in models}, target, cache, Options(**options)
        )
        summary = run.run(client, budget)
        rows = list(run.rows(summary))
    client.close()
    return summary, rows, run


__all__ = ["answers_for", "endpoint", "judge", "load_answers", "merge_judgments", "write_answer_file"]
