"""Refusals: the server's words are shown, equal ones stop the run, and what to do is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mt_bench_helpers import answers_for, endpoint, judge
from raw_server import Raw, RawServer, Request, completion
from salient_eval.mt_bench.client import CallFailed, GaveUp, HopelessError, JudgeClient
from salient_eval.mt_bench.questions import load_question_set
from salient_eval.mt_bench.refusals import CallFailed as Failed
from salient_eval.mt_bench.refusals import Streak, masked
from salient_eval.mt_bench.store import Answer
from salient_eval.mt_bench.waiting import asked_wait

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def refused_by(status: int, body: Any, **changes: Any) -> tuple[Exception, int]:
    """Ask a server that always answers like this; return the error and the number of attempts."""
    headers = changes.pop("headers", {})
    data = body if isinstance(body, bytes) else None
    with RawServer(lambda request: Raw(data if data is not None else body, status, headers)) as server:
        client = JudgeClient(endpoint(server.url, max_attempts=3, **changes))
        try:
            with pytest.raises((HopelessError, CallFailed)) as caught:
                client.chat(MESSAGES)
        finally:
            client.close()
    return caught.value, len(server.requests)


@pytest.mark.parametrize(
    ("status", "body", "words", "remedy"),
    [
        (402, {"error": {"message": "Insufficient credits", "code": 402}}, "Insufficient credits", "quota"),
        (402, {"detail": "Payment Required"}, "Payment Required", "quota"),
        (400, {"error": {"message": "Your credit balance is too low."}}, "credit balance", "quota"),
        (403, {"error": {"message": "billing is not enabled for this project"}}, "billing is not", "quota"),
        (429, {"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}, "exceeded", "quota"),
        (200, {"error": {"message": "Insufficient credits", "code": 402}}, "Insufficient credits", "quota"),
        (200, {"error": {"message": "no such key", "type": "authentication_error"}}, "no such key", "OPENAI_API_KEY"),
        (400, {"error": {"message": "only support stream mode, enable the stream parameter"}}, "stream", "--stream"),
        (400, {"error": {"message": "stream=false is not supported"}}, "not supported", "--stream"),
        (400, {"message": "System role not supported", "object": "error"}, "System role", "--merge-system"),
        (400, {"error": {"message": "Developer instruction is not enabled; system instructions invalid"}},
         "instruction", "--merge-system"),
        (400, {"error": {"message": "max_tokens is too large: 2048. At most 1024"}}, "1024", "smaller --max-tokens"),
        (422, {"detail": [{"loc": ["body", "temperature"], "msg": "Input should be greater than 0"}]},
         "body.temperature: Input should", "--temperature none"),
        (400, {"error": {"message": "Unsupported parameter: 'max_tokens'"}}, "'max_tokens'", "max_completion_tokens"),
        (307, b"", "HTTP 307", "final --base-url"),
        (301, b"<html>moved</html>", "moved", "final --base-url"),
        (405, {"detail": "Method Not Allowed"}, "Method Not Allowed", "--base-url"),
        (404, b"404 page not found", "404 page not found", "no model"),
        (401, b"", "HTTP 401", "OPENAI_API_KEY"),
    ],
)  # fmt: skip
def test_refusals_that_hold_for_every_call(status: int, body: Any, words: str, remedy: str) -> None:
    error, calls = refused_by(status, body)
    assert isinstance(error, HopelessError) and words in str(error) and remedy in str(error)
    assert calls == 1


@pytest.mark.parametrize(
    ("status", "body", "words", "too_long"),
    [
        (400, {"object": "error", "message": "This model's maximum context length is 512 tokens.", "code": 400},
         "512 tokens", True),
        (400, {"error": {"message": "prompt is too long: 9000 tokens > 4096 maximum"}}, "9000", True),
        (413, {"error": {"message": "Request Entity Too Large"}}, "Entity", True),
        (413, b"<html>413</html>", "HTTP 413", True),
        (422, {"detail": "inputs: too many tokens"}, "too many tokens", True),
        (400, {"error": {"message": "The response was filtered: content management policy"}}, "filtered", False),
        (200, {"error": {"message": "requires moderation and your input was flagged", "code": 403}}, "flagged", False),
        (400, {"error": "plain text"}, "plain text", False),
        (400, {"detail": {"nested": ["x"]}}, "nested", False),
        (418, b"\xff\xfe teapot", "teapot", False),
    ],
)  # fmt: skip
def test_refusals_of_one_prompt(status: int, body: Any, words: str, too_long: bool) -> None:
    error, calls = refused_by(status, body)
    assert type(error) is CallFailed and words in str(error) and error.too_long == too_long
    assert calls == 1


@pytest.mark.parametrize("key", ["sk-proj-abcdefghijkl0123", "my.own-Secret_value0"])
def test_no_message_shows_a_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    for status in (401, 400, 500, 402):
        error, _ = refused_by(status, {"error": {"message": f"Wrong key {key}! Not {key[:12]}"}})
        assert key not in str(error) and "Wrong key ***" in str(error)
    assert masked("a\nb\x1b[31m\x00c" + "d" * 900) == "a b [31m c" + "d" * 287 + "..."


def test_the_same_refusal_stops_the_run_after_a_few_calls(tmp_path: Path) -> None:
    with RawServer(lambda request: Raw({"error": {"message": f"odd request {request.number}"}}, 400)) as server:
        summary, rows, _ = judge(server.url, tmp_path)
        assert 3 <= len(server.requests) <= 5 and "3 calls in a row got the same refusal" in summary.stopped
        assert "odd request" in summary.stopped and len(rows) == 32
        assert summary.statuses == {"failed": 32}


def test_refusals_of_single_prompts_do_not_stop_the_run_and_are_asked_again(tmp_path: Path) -> None:
    """The judge refuses what is long; and all answers to one question. The others are judged."""
    own = load_question_set("own")
    answers = answers_for(own, "m")
    for number in range(9001, 9013):
        answers[number] = Answer(number, ("long " * 2000, "x"), ("ok", "ok"))

    def respond(request: Request) -> Raw | dict[str, Any]:
        if len(str(request.body)) > 8000:
            return Raw({"error": {"message": "maximum context length exceeded"}}, 400)
        return Raw({"error": {"message": "flagged"}}, 403) if "a9016" in str(request.body) else completion()

    with RawServer(respond) as server:
        summary, rows, _ = judge(server.url, tmp_path, answers={"m": answers})
        assert not summary.stopped and len(server.requests) == 32
        assert summary.statuses == {"graded": 6, "failed": 26} and summary.failed == 26
        judge(server.url, tmp_path, answers={"m": answers})
        assert len(server.requests) == 32 + 26, "failed calls are asked again"


def test_after_replies_a_streak_may_be_longer_and_keep_going_knows_none() -> None:
    fresh, old, patient = Streak(), Streak(), Streak(keep_going=True)
    old.reply()
    same = [bool(fresh.refused(Failed(f"HTTP 400: request {n}"))) for n in range(3)]
    assert same == [False, False, True]
    assert [bool(old.refused(Failed("x"))) for _ in range(10)] == [False] * 9 + [True]
    assert not any(patient.refused(Failed("x")) for _ in range(50))
    assert not any(Streak().refused(Failed(f"reason {kind}")) for kind in "abcdefgh")


@pytest.mark.parametrize(
    ("headers", "body", "seconds"),
    [
        ({"retry-after-ms": "1500", "retry-after": "9"}, {}, 1.5),
        ({"retry-after": "2"}, {}, 2.0),
        ({"retry-after": "Sun, 06 Nov 1994 08:49:37 GMT"}, {}, 0.0),
        ({"retry-after": "soon"}, {}, None),
        ({"retry-after": "nan"}, {}, None),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "6m0.5s",
          "x-ratelimit-remaining-requests": "9", "x-ratelimit-reset-requests": "1h"}, {}, 360.5),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "120ms"}, {}, 0.12),
        ({"x-ratelimit-reset": "17"}, {}, 17.0),
        ({"x-ratelimit-remaining-requests": "5", "x-ratelimit-reset-requests": "8s"}, {}, None),
        ({}, {"error": {"message": "Limit 10000. Please try again in 12.3s."}}, 12.3),
        ({}, {"error": {"message": "Please try again in 1m2s. Visit"}}, 62.0),
        ({}, {"error": {"message": "try again in 250ms"}}, 0.25),
        ({}, {"error": {"message": "Please retry after 7 seconds."}}, 7.0),
        ({}, {"error": {"message": "try again in 2 minutes"}}, 120.0),
        ({}, {"error": {"message": "x", "metadata": {"headers": {"Retry-After": 3}}}}, 3.0),
        ({}, {"error": ["odd"]}, None),
    ],
)  # fmt: skip
def test_waits_that_servers_ask_for(headers: dict[str, str], body: Any, seconds: float | None) -> None:
    found = asked_wait(headers, body)
    assert found == (None if seconds is None else pytest.approx(seconds, abs=0.01))


def test_a_reset_far_away_ends_the_call_at_once() -> None:
    body = {
        "error": {"message": "per day", "code": 429, "metadata": {"headers": {"X-RateLimit-Reset": "4102444800000"}}}
    }
    error, calls = refused_by(200, body)
    assert isinstance(error, GaveUp) and "per day" in str(error) and "asks to wait" in str(error) and calls == 1


def test_a_rate_limit_with_a_named_wait_costs_no_attempt(tmp_path: Path) -> None:
    """More refusals than attempts: every judgment still comes."""
    asked: dict[str, int] = {}

    def respond(request: Request) -> Raw | dict[str, Any]:
        key = str(request.body)
        asked[key] = asked.get(key, 0) + 1
        return completion() if asked[key] > 4 else Raw({"error": {"message": "TPM"}}, 429, {"retry-after-ms": "2"})

    with RawServer(respond) as server:
        summary, _, _ = judge(server.url, tmp_path, changes={"max_attempts": 2})
    assert summary.statuses == {"graded": 32} and set(asked.values()) == {5}
