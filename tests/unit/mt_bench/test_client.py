"""The judge's client against every fault: what passes is retried, what cannot pass stops."""

from __future__ import annotations

from typing import Any

import pytest
from mt_bench_helpers import endpoint
from salient_eval.mt_bench.client import CallFailed, Endpoint, HopelessError, JudgeClient
from scripted_judge import ScriptedJudge

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


def ask(server: ScriptedJudge, sleeps: list[float] | None = None, **changes: Any) -> Any:
    client = JudgeClient(endpoint(server.url, **changes), sleep=sleeps.append if sleeps is not None else None)
    try:
        return client.chat(MESSAGES)
    finally:
        client.close()


@pytest.mark.parametrize(
    "fault", ["429", "429-after", "429-date", "500", "503", "timeout", "cut", "short", "html", "close"]
)
def test_passing_faults_are_retried(judge_server: ScriptedJudge, fault: str) -> None:
    judge_server.faults = {0: fault, 1: fault}
    reply = ask(judge_server, timeout_s=0.6 if fault == "timeout" else 20.0)
    assert reply.text.startswith("Looked at it") and reply.attempts == 3
    assert judge_server.total == 3
    assert reply.model == "judge-x-0613" and reply.system_fingerprint == "fp_1"


def test_retry_after_is_honoured_and_backoff_doubles(judge_server: ScriptedJudge) -> None:
    sleeps: list[float] = []
    judge_server.faults = {0: "429-after"}
    ask(judge_server, sleeps)
    assert len(sleeps) == 1 and 0.0 < sleeps[0] <= 0.05
    sleeps.clear()
    judge_server.total, judge_server.faults = 0, dict.fromkeys(range(5), "500")
    ask(judge_server, sleeps, backoff_s=1.0, max_wait_s=6.0)
    bounds = [1.0, 2.0, 4.0, 6.0, 6.0]
    assert all(b / 2 <= s <= b for s, b in zip(sleeps, bounds, strict=True)), sleeps


def test_a_wait_longer_than_the_limit_is_not_waited_for(judge_server: ScriptedJudge) -> None:
    judge_server.faults = {0: "429-long"}
    with pytest.raises(CallFailed, match="3600 s.*max_wait_s"):
        ask(judge_server)
    assert judge_server.total == 1


def test_gives_up_after_max_attempts(judge_server: ScriptedJudge) -> None:
    judge_server.fault_for = lambda body, seen: "500"
    with pytest.raises(CallFailed, match="HTTP 500.*gave up after 3"):
        ask(judge_server, max_attempts=3)
    assert judge_server.total == 3


@pytest.mark.parametrize(
    ("fault", "words"),
    [("quota", "quota is used up"), ("401", "OPENAI_API_KEY"), ("404", "no model 'judge-x'"),
     ("parameter", "max_completion_tokens")],
)  # fmt: skip
def test_hopeless_errors_stop_at_once(judge_server: ScriptedJudge, fault: str, words: str) -> None:
    judge_server.faults = {0: fault}
    with pytest.raises(HopelessError, match=words) as caught:
        ask(judge_server)
    assert judge_server.total == 1
    assert "sk-secret" not in str(caught.value)


@pytest.mark.parametrize(("fault", "words"), [("context", "context window"), ("400", "HTTP 400")])
def test_a_request_that_is_refused_fails_alone(judge_server: ScriptedJudge, fault: str, words: str) -> None:
    judge_server.faults = {0: fault}
    with pytest.raises(CallFailed, match=words):
        ask(judge_server)
    assert judge_server.total == 1


def test_null_content_is_a_reply_without_text(judge_server: ScriptedJudge) -> None:
    judge_server.faults = {0: "null"}
    reply = ask(judge_server)
    assert reply.text is None and reply.finish_reason == "content_filter"


def test_parameters_are_sent_under_the_configured_names(judge_server: ScriptedJudge) -> None:
    ask(judge_server)
    assert judge_server.bodies[0] == {"model": "judge-x", "messages": MESSAGES, "temperature": 0.0, "max_tokens": 2048}
    ask(judge_server, token_parameter="max_completion_tokens", temperature=None, max_tokens=99, seed=3)
    assert judge_server.bodies[1] == {"model": "judge-x", "messages": MESSAGES, "max_completion_tokens": 99, "seed": 3}
    ask(judge_server, token_parameter="none", temperature=None)
    assert set(judge_server.bodies[2]) == {"model", "messages"}


def test_the_key_comes_from_the_environment_and_goes_into_one_header(
    judge_server: ScriptedJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_JUDGE_KEY", "sk-very-secret")
    target = endpoint(judge_server.url, api_key_env="MY_JUDGE_KEY")
    client = JudgeClient(target)
    client.chat(MESSAGES)
    client.close()
    assert judge_server.headers[0]["Authorization"] == "Bearer sk-very-secret"
    assert "secret" not in target.model_dump_json() + repr(target) + repr(client.__dict__)
    ask(judge_server)
    assert "Authorization" not in judge_server.headers[1]


def test_a_remote_judge_without_a_key_is_refused_before_any_call() -> None:
    with pytest.raises(ValueError, match="OPENAI_API_KEY is empty"):
        JudgeClient(Endpoint())


@pytest.mark.parametrize("url", ["api.openai.com/v1", "ftp://x/v1", "https://user:pw@x/v1", "https://x/v1?key=1"])
def test_bad_urls_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        Endpoint(base_url=url)
