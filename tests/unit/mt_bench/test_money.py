"""What a server bills never passes --max-cost, whatever happens to its replies."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest
from mt_bench_helpers import answers_for, endpoint
from raw_server import Raw, RawServer, Request, completion
from salient_eval.mt_bench.cache import ReplyCache
from salient_eval.mt_bench.client import JudgeClient
from salient_eval.mt_bench.cost import Budget, Price, estimate_tokens
from salient_eval.mt_bench.judge import Judging, Summary
from salient_eval.mt_bench.ledger import Ledger
from salient_eval.mt_bench.matches import Options
from salient_eval.mt_bench.questions import load_question_set

OWN = load_question_set("own")
MOST_COMPLETION = 2000
PRICE = Price(3.0, 60.0)
BAD_USAGE: list[Any] = [
    None, {}, [], "many", 7, {"prompt_tokens": -5, "completion_tokens": -5}, {"prompt_tokens": True},
    {"prompt_tokens": float("nan"), "completion_tokens": float("nan")},
    {"prompt_tokens": "1", "completion_tokens": "1"},
    {"prompt_tokens": 1e300, "completion_tokens": 1e300}, {"prompt_tokens": 0.5, "completion_tokens": 0.5},
    {"prompt_tokens": [1], "completion_tokens": {"a": 1}}, {"completion_tokens": 1},
]  # fmt: skip


class BillingServer(RawServer):
    """Bills a random number of tokens up to what was asked for, then lets the reply arrive or not."""

    def __init__(self, seed: int, kinds: list[str], timeout_s: float) -> None:
        super().__init__(self.reply)
        self.random, self.kinds, self.timeout_s = random.Random(seed), kinds, timeout_s
        self.billed: list[tuple[int, int]] = []
        self.bill_lock = threading.Lock()

    def reply(self, request: Request) -> Raw | dict[str, Any]:
        with self.bill_lock:
            kind = self.random.choice(self.kinds)
            bad = self.random.choice(BAD_USAGE)
            most = request.body.get("max_tokens", MOST_COMPLETION)
            completion_tokens = self.random.choice([most, most, self.random.randint(0, most)])
            size = sum(len(message["content"].encode()) for message in request.body["messages"])
            prompt_tokens = self.random.choice([size, size // 4])
            if kind not in ("429", "429-after", "400", "before"):
                self.billed.append((prompt_tokens, completion_tokens))
        good = completion(usage=(prompt_tokens, completion_tokens))
        data = json.dumps(good).encode()
        return {
            "good": Raw(data),
            "429": Raw({"error": {"message": "slow down"}}, 429),
            "429-after": Raw({"error": {"message": "slow down"}}, 429, {"retry-after-ms": "3"}),
            "400": Raw({"error": {"message": "not today"}}, 400),
            "500": Raw({"error": {"message": "broken"}}, 500),
            "504": Raw(b"<html>gateway</html>", 504),
            "slow": Raw(data, sleep_s=self.timeout_s * 1.5),
            "cut": Raw(data[: len(data) // 2]),
            "short": Raw(data, promised=10),
            "close": Raw(close=True),
            "usage": completion(usage=bad),
            "hidden": completion(usage={"prompt_tokens": prompt_tokens, "completion_tokens": 0,
                                        "total_tokens": prompt_tokens + completion_tokens}),
            "error-200": Raw({"error": {"message": "provider disconnected", "code": 502}}),
            "choice": Raw({"choices": [{"error": {"code": 502, "message": "gone"}, "finish_reason": "error"}]}),
            "null": completion(None, usage=(prompt_tokens, completion_tokens)),
            "stream": Raw(b'data: {"choices":[{"delta":{"content":"Rating: [[3]]"}}]}\n\n',
                          headers={"Content-Type": "text/event-stream"}),
        }[kind]  # fmt: skip


KINDS = ["good", "429", "429-after", "400", "500", "504", "slow", "cut", "short", "close", "usage", "hidden",
         "error-200", "choice", "null", "stream"]  # fmt: skip


def judge_once(
    url: str, folder: Path, limit: float | None, price: Price = PRICE, most: int | None = None,
    concurrency: int = 4, keep_going: bool = True, **changes: Any,
) -> Summary:  # fmt: skip
    target = endpoint(url, max_tokens=MOST_COMPLETION, **changes)
    with ReplyCache(folder / "cache.jsonl") as cache:
        ledger = Ledger(folder / "cache.spent.jsonl")
        budget = Budget(price, limit, most or target.most_completion_tokens, ledger)
        run = Judging(OWN, {"m": answers_for(OWN, "m")}, target, cache, Options(concurrency=concurrency))
        client = JudgeClient(target)
        summary = run.run(client, budget, keep_going=keep_going)
        client.close()
        ledger.close()
    return summary


def random_session(seed: int, folder: Path) -> None:
    """Some runs of one command with one limit, on one server. Checked after each: the bill of all of them."""
    chance = random.Random(seed)
    kinds = chance.sample(KINDS, chance.randint(2, len(KINDS)))
    timeout_s = 0.15
    price = Price(chance.choice([0.0, 3.0, 30.0]), chance.choice([15.0, 60.0]))
    limit = chance.choice([0.0, 0.05, 0.2, 0.5, 1.0, 3.0]) * chance.uniform(0.5, 1.5)
    with BillingServer(seed, kinds, timeout_s) as server:
        for _ in range(chance.randint(1, 3)):
            summary = judge_once(
                server.url, folder, limit, price, concurrency=chance.randint(1, 8), timeout_s=timeout_s,
                max_attempts=chance.randint(1, 5), keep_going=chance.random() < 0.7, backoff_s=0.0005,
            )  # fmt: skip
            billed = price.of(sum(b[0] for b in server.billed), sum(b[1] for b in server.billed))
            assert billed <= limit + 1e-9, f"seed {seed}: {billed} dollars billed, limit {limit}, kinds {kinds}"
            counted = summary.dollars_before + (summary.dollars or 0.0)
            assert billed - 1e-9 <= counted <= limit + 1e-9, f"seed {seed}: counted {counted}, billed {billed}"


@pytest.mark.parametrize("seed", range(4))
def test_random_faults_never_pass_the_limit(seed: int, tmp_path: Path) -> None:
    random_session(seed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_hundreds_of_random_sessions_never_pass_the_limit(block: int, tmp_path: Path) -> None:
    for seed in range(1000 + 40 * block, 1040 + 40 * block):
        (tmp_path / str(seed)).mkdir()
        random_session(seed, tmp_path / str(seed))


@pytest.mark.parametrize("usage", BAD_USAGE)
def test_a_bill_that_is_no_number_counts_at_its_ceiling(usage: Any, tmp_path: Path) -> None:
    with RawServer(lambda request: completion(usage=usage)) as server:
        summary = judge_once(server.url, tmp_path, 0.5, Price(0.0, 60.0))
    assert len(server.requests) == 4 and summary.unknown_bills == 4, "4 x 0.12 dollars fit into 0.5"
    assert summary.dollars == pytest.approx(4 * 0.12) and "--max-cost" in summary.stopped


def test_the_same_command_does_not_start_its_limit_again(tmp_path: Path) -> None:
    with RawServer(lambda request: completion(usage=(0, MOST_COMPLETION))) as server:
        for _ in range(3):
            summary = judge_once(server.url, tmp_path, 0.5, Price(0.0, 60.0))
        assert len(server.requests) == 4 and summary.dollars == 0.0 and summary.dollars_before == pytest.approx(0.48)
        assert "0.4800 are spent, 0.4800 of them in earlier runs" in summary.stopped
        judge_once(server.url, tmp_path, 1.0, Price(0.0, 60.0))
        assert len(server.requests) == 8, "a higher limit goes on"
        judge_once(server.url, tmp_path, 0.5, Price(0.0, 60.0), temperature=1.0)
        assert len(server.requests) == 12, "other calls have a limit of their own"


def test_a_cache_without_a_ledger_counts_too(tmp_path: Path) -> None:
    with RawServer(lambda request: completion(usage=(0, MOST_COMPLETION))) as server:
        judge_once(server.url, tmp_path, 0.5, Price(0.0, 60.0))
        (tmp_path / "cache.spent.jsonl").unlink()
        judge_once(server.url, tmp_path, 0.5, Price(0.0, 60.0))
    assert len(server.requests) == 4


def test_an_attempt_of_a_killed_run_counts_at_its_ceiling(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "l.jsonl")
    first.open("call", (10, 20))
    done = first.open("call", (10, 20))
    first.close_entry(done, (1, 2))
    first.open("other", (5, 5))
    first.close()
    with open(tmp_path / "l.jsonl", "ab") as file:
        file.write(b'{"attempt": "torn')
    again = Ledger(tmp_path / "l.jsonl")
    assert again.spent_on(["call", "call"]) == (11, 22) and again.damaged_lines == 1
    again.close_entry(again.open("call", (1, 1)), (1, 1))
    again.close()
    assert Ledger(tmp_path / "l.jsonl").spent_on(["call", "other", "none"]) == (17, 28)


def test_what_a_rate_limit_refuses_costs_nothing(tmp_path: Path) -> None:
    def respond(request: Request) -> Raw | dict[str, Any]:
        return completion(usage=(0, 1)) if request.number % 3 else Raw({}, 429, {"retry-after-ms": "1"})

    with RawServer(respond) as server:
        summary = judge_once(server.url, tmp_path, 1.0, Price(0.0, 60.0))
    assert summary.statuses == {} and summary.asked == 32 and not summary.stopped
    assert summary.dollars == pytest.approx(32 * 60e-6)


def test_a_model_that_writes_more_than_it_may_stops_the_run(tmp_path: Path) -> None:
    with RawServer(lambda request: completion(usage=(0, 3 * MOST_COMPLETION))) as server:
        summary = judge_once(server.url, tmp_path, 50.0, Price(0.0, 60.0), concurrency=1)
        assert "--reply-ceiling" in summary.stopped and len(server.requests) == 1
        summary = judge_once(server.url, tmp_path, 50.0, Price(0.0, 60.0), most=3 * MOST_COMPLETION)
    assert len(server.requests) == 32 and not summary.stopped, "the reply that was paid is kept"


def test_without_a_token_parameter_the_reply_needs_a_ceiling(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--reply-ceiling"):
        judge_once("http://127.0.0.1:9/v1", tmp_path, 1.0, token_parameter="none")
    with RawServer(lambda request: completion(usage=(0, 5000))) as server:
        judge_once(server.url, tmp_path, 1.0, Price(0.0, 60.0), token_parameter="none", reply_ceiling=5000)
    assert len(server.requests) == 3 and "max_tokens" not in server.requests[0].body


@pytest.mark.parametrize("limit", [float("nan"), float("inf"), -1.0])
def test_limits_that_are_none_are_refused(limit: float) -> None:
    with pytest.raises(ValueError, match="--max-cost"):
        Budget(Price(1.0, 1.0), limit, 10)
    with pytest.raises(ValueError, match="--price-"):
        Price(limit, 1.0)
    with pytest.raises(ValueError, match="--price-completion"):
        Price(1.0, limit)
    with pytest.raises(ValueError, match="limits nothing"):
        Budget(Price(0.0, 0.0), 1.0, 10)


@pytest.mark.parametrize(
    "text", ["a" * 4000, "\u2603" * 1000, "\U0001f600" * 500, "\ud800" * 100, "漢字" * 800, "\x00" * 999]
)
def test_no_text_has_more_tokens_than_its_ceiling(text: str) -> None:
    """A tokenizer that falls back to bytes makes one token of each."""
    ceiling = estimate_tokens([{"role": "user", "content": text}], ceiling=True)
    assert ceiling >= len(text.encode("utf-8", "surrogatepass")) + 8
