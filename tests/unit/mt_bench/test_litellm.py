"""Judges through litellm against servers that speak the vendors' protocols. Skipped where litellm is not installed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from mt_bench_helpers import endpoint, judge
from raw_server import Raw, RawServer, Request
from salient_eval.mt_bench.cli import app
from salient_eval.mt_bench.client import CallFailed, HopelessError, JudgeClient
from typer.testing import CliRunner

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
CLAUDE = {"model": "anthropic/claude-sonnet-4-20250514", "service": "litellm", "api_key_env": "ANTHROPIC_API_KEY"}
GEMINI = {"model": "gemini/gemini-2.5-pro", "service": "litellm", "api_key_env": "GEMINI_API_KEY"}


def anthropic_reply(text: str = "Rating: [[8]]", reason: str = "end_turn") -> dict[str, Any]:
    return {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-4-20250514",
        "content": [{"type": "text", "text": text}], "stop_reason": reason, "stop_sequence": None,
        "usage": {"input_tokens": 30, "output_tokens": 7},
    }  # fmt: skip


def gemini_reply(text: str = "Rating: [[6]]", reason: str = "STOP") -> dict[str, Any]:
    return {
        "candidates": [{"content": {"parts": [{"text": text}], "role": "model"}, "finishReason": reason, "index": 0}],
        "usageMetadata": {"promptTokenCount": 20, "candidatesTokenCount": 5, "thoughtsTokenCount": 4,
                          "totalTokenCount": 29},
        "modelVersion": "gemini-2.5-pro",
    }  # fmt: skip


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-0123456789abcdef")
    monkeypatch.setenv("GEMINI_API_KEY", "AIza-0123456789abcdef")


def ask(server: RawServer, settings: dict[str, Any], **changes: Any) -> Any:
    client = JudgeClient(endpoint(server.url.removesuffix("/v1"), **{"max_attempts": 2, **settings, **changes}))
    try:
        return client.chat(MESSAGES)
    finally:
        client.close()


def test_without_the_package_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "litellm", None)
    with pytest.raises(ValueError, match=r"pip install 'salient-ds\[judges\]'"):
        JudgeClient(endpoint("http://127.0.0.1:9/v1", service="litellm", model="anthropic/x"))
    result = CliRunner().invoke(
        app, ["doctor", "--questions", "own", "--service", "litellm", "--judge-model", "gemini/x"]
    )
    assert result.exit_code == 2 and "salient-ds[judges]" in result.output


def test_options_that_do_not_go_with_it_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("litellm")
    with pytest.raises(ValueError, match="--stream"):
        JudgeClient(endpoint("http://127.0.0.1:9/v1", stream=True, **CLAUDE))


def test_anthropic(tmp_path: Path) -> None:
    pytest.importorskip("litellm")
    with RawServer(lambda request: anthropic_reply()) as server:
        reply = ask(server, CLAUDE)
        sent = server.requests[0]
        assert sent.path.endswith("/v1/messages") and sent.body["max_tokens"] == 2048
        assert {k.lower(): v for k, v in sent.headers.items()}["x-api-key"] == "sk-ant-0123456789abcdef"
        assert "s" in str(sent.body["system"]) and sent.body["messages"][0]["role"] == "user"
        assert reply.text == "Rating: [[8]]" and reply.finish_reason == "stop"
        assert (reply.prompt_tokens, reply.completion_tokens) == (30, 7)
        summary, rows, _ = judge(server.url.removesuffix("/v1"), tmp_path, changes=CLAUDE)
    assert summary.statuses == {"graded": 32} and {row["score"] for row in rows} == {8.0}
    with RawServer(lambda request: anthropic_reply(reason="max_tokens")) as server:
        assert ask(server, CLAUDE).finish_reason == "length"


def test_gemini(tmp_path: Path) -> None:
    pytest.importorskip("litellm")
    with RawServer(lambda request: gemini_reply()) as server:
        reply = ask(server, GEMINI)
    assert "gemini-2.5-pro" in server.requests[0].path and "generateContent" in server.requests[0].path
    assert reply.text == "Rating: [[6]]" and reply.finish_reason == "stop"
    assert reply.prompt_tokens == 20 and reply.completion_tokens == 9, "thoughts are billed"


@pytest.mark.parametrize(
    ("status", "message", "kind", "words"),
    [
        (401, "invalid x-api-key sk-ant-0123456789abcdef", HopelessError, "ANTHROPIC_API_KEY"),
        (400, "Your credit balance is too low to access the Anthropic API.", HopelessError, "quota"),
        (404, "model: claude-x", HopelessError, "no model"),
        (400, "prompt is too long: 250000 tokens > 200000 maximum", CallFailed, "250000"),
        (529, "Overloaded", CallFailed, "gave up after 2"),
        (500, "broken", CallFailed, "gave up after 2"),
    ],
)  # fmt: skip
def test_the_vendors_refusals_mean_what_ours_mean(status: int, message: str, kind: type, words: str) -> None:
    pytest.importorskip("litellm")
    body = {"type": "error", "error": {"type": "some_error", "message": message}}

    def respond(request: Request) -> Raw:
        return Raw(body, status)

    with RawServer(respond) as server, pytest.raises(kind, match=words) as caught:
        ask(server, CLAUDE)
    assert "0123456789abcdef" not in str(caught.value)
    assert len(server.requests) == (2 if status >= 500 else 1), "litellm itself retries nothing"


def test_the_deadline_holds() -> None:
    pytest.importorskip("litellm")
    with (
        RawServer(lambda request: Raw(anthropic_reply(), sleep_s=3.0)) as server,
        pytest.raises(CallFailed, match="timeout|Timeout"),
    ):
        ask(server, CLAUDE, timeout_s=0.5, max_attempts=1)
