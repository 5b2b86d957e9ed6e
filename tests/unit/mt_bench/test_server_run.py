"""Answers through a scripted OpenAI-compatible server: what is sent, what comes of faults, and going on afterwards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from generate_helpers import answers_of, export, generate, make_answering_llama, record_of, rows_of
from salient_eval.mt_bench.answer_file import AnswerJournal
from salient_eval.mt_bench.answering import TEMPERATURES, turn_seed
from salient_eval.mt_bench.questions import load_question_set
from scripted_judge import Body, ScriptedJudge

QUESTIONS = load_question_set("own").questions


def answer_by_hash(body: Body) -> str:
    text = body["prompt"] if "prompt" in body else str(body["messages"])
    return f" Answer {hashlib.sha256(text.encode()).hexdigest()[:8]} "


@pytest.fixture
def server() -> Iterator[ScriptedJudge]:
    with ScriptedJudge(answer_by_hash) as scripted:
        yield scripted


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tiny_llama, tmp_path_factory.mktemp("served") / "adapter")


def ask(server: ScriptedJudge, data: Path, *arguments: Any, **options: Any) -> str:
    where = ("--endpoint", server.url, "--model-name", "tuned", "--model-id", "m", "--attempts", "1")
    return generate(data, *arguments, *where, **options)


def test_our_rendered_prompt_is_sent_with_temperature_and_seed(
    server: ScriptedJudge, adapter: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    ask(server, tmp_path, adapter)
    assert server.total == 32
    bodies = {(body["prompt"].count("### Instruction"), body["seed"]): body for body in server.bodies}
    rows = rows_of(tmp_path, "m")
    for question, row in zip(QUESTIONS, rows, strict=True):
        first, second = (bodies[turn, turn_seed(0, question.question_id, turn) % 2**31] for turn in (1, 2))
        assert first["prompt"].endswith(f"### Instruction:\n{question.turns[0]}\n\n### Response:")
        said = answer_by_hash(first).strip()
        assert (
            second["prompt"] == f"{first['prompt']}{said}</s>\n\n### Instruction:\n{question.turns[1]}\n\n### Response:"
        )
        assert {body["temperature"] for body in (first, second)} == {TEMPERATURES[question.category]}
        assert first["top_p"] == 1.0 and first["max_tokens"] == 24 and first["model"] == "tuned"
        assert row["choices"][0]["turns"] == [said, answer_by_hash(second).strip()]
        assert row["statuses"] == ["ok", "ok"] and row["generation"]["endpoint"] == server.url
    assert rows[0]["generation"]["template_sha256"] == record_of(tiny_llama)["sha256"]


def test_the_servers_template_is_used_when_nothing_else_is_known_and_never_against_the_record(
    server: ScriptedJudge, adapter: Path, tmp_path: Path, tiny_llama: Path
) -> None:
    ask(server, tmp_path, "--temperature", "none")
    longest = max(server.bodies, key=lambda body: len(body["messages"]))
    assert [message["role"] for message in longest["messages"]] == ["user", "assistant", "user"]
    assert "temperature" not in longest and "top_p" not in longest
    assert rows_of(tmp_path, "m")[0]["template"] == "server"
    assert "leave --template out" in ask(server, tmp_path, adapter, "--template", "server", fails=True)
    assert "give --template" in ask(server, tmp_path, tiny_llama, fails=True)
    assert "needs a tokenizer" in ask(server, tmp_path, "--template", "alpaca", fails=True)
    assert "does not go with" in ask(server, tmp_path, "--stop", "x", fails=True)
    assert server.total == 32


def test_no_more_tokens_are_asked_for_than_the_models_window_holds(
    server: ScriptedJudge, tiny_llama: Path, tmp_path: Path
) -> None:
    """Some servers refuse such requests; a local model would be cut there."""
    base = make_answering_llama(tmp_path / "short", window=190)
    server.fault_for = lambda body, seen: "garble" if body["max_tokens"] < 24 else None
    ask(server, tmp_path, base, "--template", "alpaca")
    generate(tmp_path, base, "--template", "alpaca", "--model-id", "local")
    prompts = {row["question_id"]: row["tokens"][0][0] for row in rows_of(tmp_path, "local")}
    limits = {body["seed"]: body["max_tokens"] for body in server.bodies}
    kinds = set()
    for row in rows_of(tmp_path, "m"):
        number, status, reason = row["question_id"], row["statuses"][0], row["reasons"][0]
        room = min(24, 190 - prompts[number])
        assert limits.get(turn_seed(0, number, 1) % 2**31, 0) == max(0, room)
        if room < 1:
            assert (status, reason) == ("failed", f"the prompt has {prompts[number]} tokens, the model's window 190")
        elif room < 24:
            assert (status, reason) == ("truncated", "cut at the end of the model's window of 190")
        kinds.add((room < 1, room < 24))
    assert len(kinds) == 3, "all three cases must occur"


def test_an_interrupt_leaves_at_once_and_keeps_what_there_is(
    server: ScriptedJudge, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(journal: AnswerJournal, row: object) -> None:
        if len(journal.done) == 3:
            raise KeyboardInterrupt
        add(journal, row)

    add = AnswerJournal.add
    with monkeypatch.context() as patch:
        patch.setattr(AnswerJournal, "add", interrupted)
        ask(server, tmp_path, adapter, "--concurrency", "1", fails=True)
    assert server.total == 2 * 4, "the other questions are not asked"
    asked = server.total
    ask(server, tmp_path, adapter)
    assert server.total == asked + 2 * 13 and len(rows_of(tmp_path, "m")) == 16


def test_what_is_no_answer_is_marked(server: ScriptedJudge, adapter: Path, tmp_path: Path) -> None:
    kinds = {"closed for two weeks": "context", "rain on three": "null", "lighthouse": "garble"}

    def fault(body: Body, seen: int) -> str | None:
        if body["prompt"].count("### Instruction") > 1:
            return None
        return next((kind for text, kind in kinds.items() if text in body["prompt"]), None)

    server.fault_for = fault
    server.reply = lambda body: "  " if "swimming" in body["prompt"] else answer_by_hash(body)
    output = ask(server, tmp_path, adapter)
    rows = {row["question_id"]: row for row in rows_of(tmp_path, "m")}
    assert rows[9001]["statuses"] == ["failed", "failed"] and "context window" in rows[9001]["reasons"][0]
    assert rows[9002]["statuses"] == ["failed", "failed"] and "content_filter" in rows[9002]["reasons"][0]
    assert rows[9003]["statuses"] == ["truncated", "ok"] and rows[9003]["reasons"] == ["cut by the server", ""]
    assert rows[9004]["statuses"] == ["empty", "failed"] and rows[9004]["reasons"][1] == "turn 1 is empty"
    assert sum(row["statuses"] == ["ok", "ok"] for row in rows.values()) == 12 and "2 x turn 1 is failed" in output


def test_questions_without_any_reply_are_asked_again_and_only_those(
    server: ScriptedJudge, adapter: Path, tmp_path: Path
) -> None:
    server.fault_for = lambda body, seen: "500" if "lighthouse" in body["prompt"] else None
    output = ask(server, tmp_path, adapter, fails=True)
    assert "stopped early" in output and "HTTP 500" in output and server.total == 31
    assert not (tmp_path / "salient_own" / "model_answer" / "m.jsonl").exists()
    server.fault_for, server.total = (lambda body, seen: None), 0
    ask(server, tmp_path, adapter)
    assert server.total == 2
    ask(server, tmp_path, adapter)
    assert server.total == 2
    resumed = answers_of(tmp_path, "m")
    ask(server, tmp_path, adapter, "--overwrite")
    assert server.total == 34 and answers_of(tmp_path, "m") == resumed


@pytest.mark.parametrize(
    ("fault", "message"), [("401", "OPENAI_API_KEY"), ("404", "no model 'tuned'"), ("503", "HTTP 503")]
)
def test_a_server_that_is_gone_or_refuses_stops_the_run(
    server: ScriptedJudge, adapter: Path, tmp_path: Path, fault: str, message: str
) -> None:
    server.fault_for = lambda body, seen: fault
    output = ask(server, tmp_path, adapter, "--concurrency", "2", fails=True)
    assert "stopped early" in output and message in output
    assert server.total <= 3 + 1, "it is not asked 16 times"
