"""A judge's server that drips, floods, redirects or sends nonsense ends no run and hangs no call."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from mt_bench_helpers import endpoint, judge
from raw_server import Raw, RawServer, Request, completion
from salient_eval.mt_bench import transport
from salient_eval.mt_bench.client import CallFailed, GaveUp, HopelessError, JudgeClient
from salient_eval.mt_bench.completion import NoCompletion, read_body, to_reply

MESSAGES = [{"role": "user", "content": "u"}]


def ask(url: str, **changes: Any) -> Any:
    client = JudgeClient(endpoint(url, **{"max_attempts": 1, **changes}))
    try:
        return client.chat(MESSAGES)
    finally:
        client.close()


def test_the_deadline_holds_for_a_server_that_drips() -> None:
    """Each byte comes in time; all of them would take 20 s."""
    with (
        RawServer(lambda request: Raw(json.dumps(completion()).encode(), drip_s=0.1)) as server,
        pytest.raises(GaveUp, match="no whole reply after 0.3 s"),
    ):
        ask(server.url, timeout_s=0.3)


@pytest.mark.parametrize("packed", [False, True])
def test_a_reply_of_a_hundred_megabytes_is_not_read(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "MOST_BYTES", 1 << 20)
    flood = b" " * (8 << 20)
    bomb = Raw(gzip.compress(flood), headers={"Content-Encoding": "gzip"}) if packed else Raw(flood)
    with RawServer(lambda request: bomb) as server, pytest.raises(CallFailed, match="larger than 1 MiB"):
        ask(server.url, max_attempts=3)
    assert len(server.requests) == 1


def test_packed_replies_are_read_and_unknown_packings_refused() -> None:
    data = json.dumps(completion()).encode()
    with RawServer(lambda request: Raw(gzip.compress(data), headers={"Content-Encoding": "gzip"})) as server:
        assert ask(server.url).text == "Rating: [[8]]"
    with (
        RawServer(lambda request: Raw(data, headers={"Content-Encoding": "br"})) as server,
        pytest.raises(CallFailed, match="packed as 'br'"),
    ):
        ask(server.url)
    with (
        RawServer(lambda request: Raw(b"no gzip", headers={"Content-Encoding": "gzip"})) as server,
        pytest.raises(GaveUp, match="connection problem"),
    ):
        ask(server.url)


def test_no_redirect_carries_the_key_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-my-key-0123456789")
    with RawServer(lambda request: completion()) as thief:
        for status in (301, 302, 303, 307, 308):
            with (
                RawServer(lambda request, s=status: Raw(b"", s, {"Location": thief.url})) as server,  # type: ignore[misc]
                pytest.raises(HopelessError, match="redirects are not followed"),
            ):
                ask(server.url)
    assert not thief.requests


WRONG: list[Any] = [
    [], {}, 7, "text", None, {"choices": None}, {"choices": {}}, {"choices": [None]}, {"choices": ["x"]},
    {"choices": [{"message": None}]}, {"choices": [{"message": "x"}]}, {"choices": [{"message": []}]},
    completion(7), completion({"a": 1}), completion(finish={"a": 1}), completion(finish=3), completion(usage="x"),
    completion(usage={"prompt_tokens": {}, "completion_tokens": []}), completion(model=[1]), completion(error=[]),
    completion(system_fingerprint={"a": 2}), {"error": 5}, {"error": [[]]}, {"error": {"message": {}, "code": []}},
    {"error": {"code": "9" * 4000}}, {"error": {"metadata": 3, "message": None}}, {"error": {"type": 3.5}},
]  # fmt: skip


@pytest.mark.parametrize("status", [200, 400, 503])
def test_wrong_types_never_end_the_run(status: int, tmp_path: Path) -> None:
    with RawServer(lambda request: Raw(json.dumps(WRONG[request.number % len(WRONG)]).encode(), status)) as server:
        summary, rows, _ = judge(server.url, tmp_path, changes={"max_attempts": 2, "backoff_s": 0.0})
        assert len(rows) == 32 and len(server.requests) >= 3
        with RawServer(lambda request: Raw(b"[" * 100_000, status)) as deep, pytest.raises(CallFailed):
            ask(deep.url)


def test_a_stream_is_put_together() -> None:
    chunks: list[Any] = [
        {"model": "j-1", "choices": [{"delta": {"role": "assistant", "reasoning_content": "thi"}}]},
        {"choices": [{"delta": {"reasoning_content": "nk", "content": "Rat"}}]},
        {"choices": [{"delta": {"content": "ing: [[7]]"}, "finish_reason": "length"}]},
        {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 9}},
    ]
    data = (
        ": comment\r\n\r\n" + "".join(f"data: {json.dumps(chunk)}\r\n\r\n" for chunk in chunks) + "data: [DONE]\r\n\r\n"
    )
    body = read_body(data.encode(), "text/event-stream; charset=utf-8")
    reply = to_reply(body, 1.0, 1)
    assert (reply.text, reply.finish_reason, reply.model) == ("Rating: [[7]]", "length", "j-1")
    assert (reply.prompt_tokens, reply.completion_tokens) == (3, 9)
    assert body["choices"][0]["message"]["reasoning_content"] == "think"
    for cut in (data[:120], data[: data.index("ing:")], 'data: {"choices": [{"delta": {"content": "x"}}]}\n\n'):
        with pytest.raises(NoCompletion):
            read_body(cut.encode(), "text/event-stream")
    assert read_body(b'data: {"error": {"message": "gone", "code": 502}}\n\n')["error"]["code"] == 502


def test_streams_are_asked_for_with_their_usage() -> None:
    line = json.dumps({"choices": [{"delta": {"content": "[[5]]"}, "finish_reason": "stop"}]})
    with RawServer(lambda request: Raw(f"data: {line}\n\ndata: [DONE]\n\n".encode())) as server:
        assert ask(server.url, stream=True).text == "[[5]]"
        assert server.requests[0].body["stream_options"] == {"include_usage": True}


def test_a_key_in_clear_text_over_the_network_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-my-key-0123456789")
    for url, warned in (("http://judge.example:8000/v1", True), ("https://judge.example/v1", False),
                        ("http://127.0.0.1:8000/v1", False)):  # fmt: skip
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            JudgeClient(endpoint(url)).close()
        assert ("unencrypted" in caplog.text) == warned and "sk-my" not in caplog.text


def test_a_call_can_be_made_from_many_threads_and_requests_carry_one_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "value-of-the-key")
    seen: list[Request] = []
    with RawServer(lambda request: (seen.append(request), completion())[1]) as server:
        ask(server.url.replace("/v1", "/openai/deployments/gpt4?api-version=2024-10-21"), api_key_env="JUDGE_KEY")
        ask(server.url, api_key_env="JUDGE_KEY", headers={"X-Token": "env:JUDGE_KEY", "X-Title": "bench"})
    assert seen[0].path == "/openai/deployments/gpt4/chat/completions?api-version=2024-10-21"
    assert seen[0].headers["api-key"] == "value-of-the-key" and "Authorization" not in seen[0].headers
    assert seen[1].headers["Authorization"] == "Bearer value-of-the-key"
    assert (seen[1].headers["X-Token"], seen[1].headers["X-Title"]) == ("value-of-the-key", "bench")
