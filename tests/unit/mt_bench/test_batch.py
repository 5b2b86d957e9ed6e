"""The batch interface against a scripted server: every step can be killed, nothing is ordered or paid twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mt_bench_helpers import answers_for, endpoint, write_answer_file
from raw_server import Raw, RawServer, Request, completion
from salient_eval.mt_bench.asking import Summary
from salient_eval.mt_bench.batch import BatchRun
from salient_eval.mt_bench.batch_service import Plans, plans_path
from salient_eval.mt_bench.cache import ReplyCache
from salient_eval.mt_bench.cli import app
from salient_eval.mt_bench.cost import Budget, Price
from salient_eval.mt_bench.judge import Judging
from salient_eval.mt_bench.ledger import Ledger
from salient_eval.mt_bench.matches import Options
from salient_eval.mt_bench.questions import load_question_set
from salient_eval.mt_bench.refusals import GaveUp, HopelessError
from salient_eval.mt_bench.store import Layout
from typer.testing import CliRunner

OWN = load_question_set("own")
PRICE = Price(0.0, 60.0)


class BatchServer(RawServer):
    """Answers all calls of a batch when it was looked at ``looks`` times. ``spoil`` changes the result lines."""

    def __init__(self) -> None:
        super().__init__(self.reply)
        self.files: dict[str, bytes] = {}
        self.batches: list[dict[str, Any]] = []
        self.looks, self.final, self.usage = 2, "completed", (0, 100)
        self.lose_order = False
        self.refuse: dict[str, Raw] = {}
        self.spoil: Any = lambda number, row: row

    def reply(self, request: Request) -> Raw | dict[str, Any]:
        path = request.path.removeprefix("/v1").partition("?")[0]
        if path in self.refuse:
            return self.refuse[path]
        if path == "/files":
            name = f"file-{len(self.files)}"
            self.files[name] = request.body
            return {"id": name}
        if path == "/batches" and request.method == "POST":
            self.batches.append({**request.body, "id": f"batch_{len(self.batches)}", "status": "validating", "seen": 0})
            return Raw(close=True) if self.lose_order else self.batches[-1]
        if path == "/batches":
            return {"data": self.batches[::-1], "has_more": False}
        if path.startswith("/batches/"):
            return self.look(next(batch for batch in self.batches if path.endswith(batch["id"])))
        return Raw(self.files[path.split("/")[2]])

    def look(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["seen"] += 1
        if batch["seen"] >= self.looks and "output_file_id" not in batch:
            rows = [
                json.loads(line) for line in self.files[batch["input_file_id"]].split(b"\n") if b"custom_id" in line
            ]
            body = completion("Said. Rating: [[7]]", usage=self.usage)
            done = [{"custom_id": row["custom_id"], "response": {"status_code": 200, "body": body}, "error": None}
                    for row in rows[::-1]]  # fmt: skip
            kept = [line for n, row in enumerate(done) if (line := self.spoil(n, row)) is not None]
            texts = [line if isinstance(line, str) else json.dumps(line) for line in kept]
            self.files["out-" + batch["id"]] = "\n".join(texts).encode()
            batch |= {"status": self.final, "output_file_id": "out-" + batch["id"]}
        return batch

    def ordered(self) -> list[int]:
        return [self.files[batch["input_file_id"]].count(b'"custom_id"') for batch in self.batches]


def judge_batch(
    url: str, folder: Path, limit: float | None = None, sleep: Any = lambda s: None
) -> tuple[Summary, Judging]:
    target = endpoint(url, max_tokens=1000, max_attempts=2)
    with ReplyCache(folder / "cache.jsonl") as cache:
        run = Judging(OWN, {"m": answers_for(OWN, "m")}, target, cache, Options())
        ledger = Ledger(folder / "cache.spent.jsonl")
        budget = Budget(PRICE, limit, target.most_completion_tokens, ledger)
        batch = BatchRun(run, target, budget, ledger, Plans(plans_path(cache.path)), 0.0, lambda line: None, sleep)
        try:
            summary = batch.run()
            list(run.rows(summary))
        finally:
            batch.close()
            ledger.close()
    return summary, run


def test_all_calls_go_into_one_batch_and_are_never_ordered_again(tmp_path: Path) -> None:
    with BatchServer() as server:
        summary, _ = judge_batch(server.url, tmp_path)
        assert server.ordered() == [32] and summary.statuses == {"graded": 32}
        assert summary.dollars == pytest.approx(32 * 100 * 60e-6) and summary.dollars_before == 0.0
        lines = [json.loads(line) for line in server.files["file-0"].split(b"\n") if b"custom_id" in line]
        assert {(row["method"], row["url"]) for row in lines} == {("POST", "/v1/chat/completions")}
        assert lines[0]["body"]["max_tokens"] == 1000 and len({row["custom_id"] for row in lines}) == 32
        assert b'name="purpose"' in server.files["file-0"]
        again, _ = judge_batch(server.url, tmp_path)
        assert server.ordered() == [32] and again.from_cache == 32 and again.statuses == {"graded": 32}


def test_a_run_killed_while_it_waits_collects_its_batch(tmp_path: Path) -> None:
    def kill(seconds: float) -> None:
        raise KeyboardInterrupt

    with BatchServer() as server:
        with pytest.raises(KeyboardInterrupt):
            judge_batch(server.url, tmp_path, sleep=kill)
        summary, _ = judge_batch(server.url, tmp_path)
        assert server.ordered() == [32] and summary.statuses == {"graded": 32}
        assert summary.dollars_before + (summary.dollars or 0.0) == pytest.approx(32 * 100 * 60e-6)


def test_an_order_whose_reply_was_lost_is_found_again(tmp_path: Path) -> None:
    with BatchServer() as server:
        server.lose_order = True
        with pytest.raises(GaveUp, match="same command"):
            judge_batch(server.url, tmp_path)
        server.lose_order = False
        summary, _ = judge_batch(server.url, tmp_path)
        assert server.ordered() == [32] and summary.statuses == {"graded": 32}


def test_a_plan_that_was_never_ordered_costs_nothing(tmp_path: Path) -> None:
    with BatchServer() as server:
        server.refuse["/files"] = Raw({"error": {"message": "try later"}}, 503)
        with pytest.raises(GaveUp, match="HTTP 503: try later"):
            judge_batch(server.url, tmp_path)
        del server.refuse["/files"]
        summary, _ = judge_batch(server.url, tmp_path, limit=32 * 0.0601)
        assert server.ordered() == [32] and summary.statuses == {"graded": 32}


def test_what_an_expired_batch_did_not_answer_is_ordered_again(tmp_path: Path) -> None:
    with BatchServer() as server:
        server.final, server.spoil = "expired", lambda n, row: row if n < 20 else None
        summary, _ = judge_batch(server.url, tmp_path)
        assert summary.statuses == {"graded": 20, "failed": 12} and summary.failed == 12
        assert "expired" in next(iter(summary.reasons)) and summary.dollars == pytest.approx(20 * 0.006)
        server.final, server.spoil = "completed", lambda n, row: row
        summary, _ = judge_batch(server.url, tmp_path)
        assert server.ordered() == [32, 12] and summary.statuses == {"graded": 32}


def test_single_results_may_be_refused_damaged_or_nonsense(tmp_path: Path) -> None:
    def spoil(number: int, row: dict[str, Any]) -> Any:
        refused = {"status_code": 400, "body": {"error": {"message": "flagged"}}}
        return {
            0: {**row, "response": refused}, 1: "{damaged", 2: {**row, "response": None},
            3: {**row, "response": {"status_code": 200, "body": {"choices": "x"}}}, 4: [1], 5: {**row, "custom_id": 7},
            6: {**row, "response": {"status_code": 200, "body": completion(usage={"prompt_tokens": float("nan")})}},
            7: {**row, "response": None, "error": {"code": "batch_expired", "message": "too late"}},
            8: "[" * 50_000, 9: {**row, "custom_id": "unknown"},
        }.get(number, row)  # fmt: skip

    with BatchServer() as server:
        server.spoil = spoil
        summary, _ = judge_batch(server.url, tmp_path)
    assert summary.statuses == {"graded": 23, "failed": 9} and summary.unknown_bills == 1
    assert any("flagged" in reason for reason in summary.reasons) and any("late" in r for r in summary.reasons)


def test_no_batch_is_ordered_that_could_pass_the_limit(tmp_path: Path) -> None:
    """A call can cost 0.06 dollars."""
    with BatchServer() as server:
        server.usage = (0, 1000)
        for _ in range(2):
            summary, _ = judge_batch(server.url, tmp_path, limit=0.5)
            assert server.ordered() == [8] and "--max-cost" in summary.stopped
        judge_batch(server.url, tmp_path, limit=1.0)
        assert server.ordered() == [8, 8]


def test_refused_batches_stop_with_the_servers_words(tmp_path: Path) -> None:
    with BatchServer() as server:
        server.refuse["/files"] = Raw({"detail": "Not Found"}, 404)
        with pytest.raises(HopelessError, match="Not Found.*leave --batch out"):
            judge_batch(server.url, tmp_path)
        server.refuse = {"/batches": Raw({"error": {"message": "Enqueued token limit reached"}}, 400)}
        with pytest.raises(HopelessError, match="Enqueued token limit"):
            judge_batch(server.url, tmp_path)
        server.refuse, server.final = {}, "failed"
        server.spoil = lambda n, row: None
        with pytest.raises(HopelessError, match="failed"):
            judge_batch(server.url, tmp_path)
        server.final, server.spoil = "completed", lambda n, row: row
        summary, _ = judge_batch(server.url, tmp_path, limit=32 * 0.0601)
        assert summary.statuses == {"graded": 32}, "refused orders cost nothing"


def test_the_command_orders_and_collects_and_does_not_pay_beside_an_open_batch(tmp_path: Path) -> None:
    write_answer_file(Layout(tmp_path, "salient_own"), OWN, "m")
    with BatchServer() as server:
        command = [
            "judge",
            "--questions",
            "own",
            "--data",
            str(tmp_path),
            "--judge-model",
            "j",
            "--base-url",
            server.url,
        ]
        command += ["--attempts", "1", "--poll", "0.01"]
        server.lose_order = True
        result = CliRunner().invoke(app, [*command, "--batch"])
        assert result.exit_code == 3 and "Run the same command to go on" in result.output
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 2 and "a batch of 32 calls" in " ".join(result.output.split())
        server.lose_order = False
        result = CliRunner().invoke(app, [*command, "--batch"])
        assert result.exit_code == 0 and "graded" in result.output, result.output
        assert server.ordered() == [32]
        assert CliRunner().invoke(app, command).exit_code == 0
        assert not [r for r in server.requests if r.path.endswith("/chat/completions")]
        wrong = CliRunner().invoke(app, [*command, "--batch", "--stream"])
        assert wrong.exit_code == 2 and "--batch goes with" in wrong.output
