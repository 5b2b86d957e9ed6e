"""The whole way for real: training, export, answers, FastChat's servers as the judge, and the report's numbers.

The judge is a tiny LLaMA that was overfitted to give first turns 7 and second turns 4. The servers are FastChat's
controller, model worker and OpenAI server, processes on the loopback.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.launcher.runs import environment, write_run
from tests.mt_bench_e2e.tiny_judge import SCORES, TEMPLATE, make_judge
from tests.support.spawn import free_port

ROOT = Path(__file__).parents[2]
NAME = "tiny-judge"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@pytest.fixture(scope="module")
def judge_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_judge(tmp_path_factory.mktemp("judge") / "model")


@pytest.fixture(scope="module")
def judge_url(judge_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """FastChat's three servers, ready; they must all be gone after one SIGTERM."""
    for needed in ("fastapi", "uvicorn", "peft", "accelerate"):  # importing FastChat's servers would redirect stdout
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"fschat[model_worker] needs {needed}")
    logs = tmp_path_factory.mktemp("logs")
    port = free_port()
    command = [sys.executable, str(ROOT / "launch" / "fastchat_server.py"), str(judge_model), "--name", NAME]
    command += ["--port", str(port), "--device", "cpu", "--conv-template", TEMPLATE, "--logs", str(logs)]
    with open(logs / "server.txt", "wb") as out:
        process = subprocess.Popen(command, env=environment(), stdout=out, stderr=out, start_new_session=True)
    try:
        deadline = time.monotonic() + 600
        while b"ready" not in (logs / "server.txt").read_bytes():
            assert process.poll() is None and time.monotonic() < deadline, output(logs)
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
        process.terminate()
        assert process.wait(60) == 0, output(logs)
        assert b"stopped" in (logs / "server.txt").read_bytes()
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def output(logs: Path) -> str:
    return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in logs.glob("*.txt"))


def script(name: str, *arguments: object, **variables: str) -> str:
    """Run one of the shell scripts in launch/; its output."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / name), *map(str, arguments)], env=environment() | variables, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=900, cwd=arguments[0].parent,  # type: ignore[attr-defined]
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


def mt_bench(*arguments: object) -> str:
    from salient_eval.mt_bench.cli import app

    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def rows(folder: Path, model: str) -> dict[int, dict]:
    lines = (folder / "salient_own" / "model_answer" / f"{model}.jsonl").read_text().splitlines()
    return {row["question_id"]: row for row in map(json.loads, lines)}


def texts(folder: Path, model: str) -> dict[int, list[str]]:
    return {number: row["choices"][0]["turns"] for number, row in rows(folder, model).items()}


def test_from_a_run_file_to_the_report(tiny_llama: Path, tiny_alpaca: Path, judge_url: str, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    run = write_run(tmp_path, base, tiny_alpaca)
    data, report = tmp_path / "data", tmp_path / "report"
    variables = {
        "QUESTIONS": "own", "BASE_TOO": "1", "DATA": str(data), "REPORT": str(report), "MODEL_ID": "adapter",
        "JUDGE_MODEL": NAME, "JUDGE_URL": judge_url, "GENERATE_ARGS": "--max-new-tokens 16",
        "JUDGE_ARGS": "--judge-truncated --concurrency 4", "REPORT_ARGS": "--max-failure-rate 0.8",
    }  # fmt: skip
    said = script("mt_bench_local_judge.sh", run, **variables)
    assert "== train" in said and "export: " in said and "== report" in said
    answers = {name: rows(data, name) for name in ("adapter", "base")}
    changed = [number for number in answers["base"] if texts(data, "base")[number] != texts(data, "adapter")[number]]
    assert len(changed) >= 8, "training must show in the answers"
    found = json.loads((report / "report.json").read_text())
    assert {entry["model"] for entry in found["single"]["models"]} == {"adapter", "base"}
    for entry in found["single"]["models"]:
        statuses = [row["statuses"] for row in answers[entry["model"]].values()]
        judged = {turn: sum({"empty", "failed"}.isdisjoint(s[:turn]) for s in statuses) for turn in (1, 2)}
        for turn in (1, 2):
            cell = entry[f"turn_{turn}"]
            assert cell["mean"] == SCORES[turn] and cell["unparsed"] == 0
            assert (cell["graded"], cell["failed"]) == (judged[turn], 16 - judged[turn])
            assert judged[turn] >= 4, statuses
        pooled = sum(SCORES[turn] * judged[turn] for turn in (1, 2)) / (judged[1] + judged[2])
        assert entry["average_pooled"]["mean"] == pytest.approx(pooled, abs=1e-12)
        assert entry["average_of_turns"] == pytest.approx(5.5) and entry["template"] == "alpaca"
    assert found["provenance"]["judge_models_answering"].keys() == {NAME}
    assert found["provenance"]["endpoint"]["base_url"] == judge_url
    assert (report / "report.html").stat().st_size > 10_000

    before = (data / "salient_own" / "model_answer" / "adapter.jsonl").read_bytes()
    again = script("mt_bench_local_judge.sh", run, **variables)
    assert "is finished" in again and "is there" in again and "calls made │ 0" in " ".join(again.split())
    assert (data / "salient_own" / "model_answer" / "adapter.jsonl").read_bytes() == before
    assert json.loads((report / "report.json").read_text()) == found

    # The run directory itself, folded by our own code, answers as the adapter that PEFT loaded.
    mt_bench("generate", tmp_path / "run", "--data", data, "--questions", "own", "--max-new-tokens", "16",
             "--model-id", "from-run")  # fmt: skip
    assert texts(data, "from-run") == texts(data, "adapter")


def test_fastchat_answers_our_prompt_as_the_local_model_does(judge_model: Path, judge_url: str, tmp_path: Path) -> None:
    common = ("generate", judge_model, "--template", TEMPLATE, "--questions", "own", "--data", tmp_path,
              "--max-new-tokens", "12", "--temperature", "0")  # fmt: skip
    mt_bench(*common, "--model-id", "local")
    mt_bench(*common, "--model-id", "served", "--endpoint", judge_url, "--model-name", NAME, "--concurrency", "4")
    local, served = rows(tmp_path, "local"), rows(tmp_path, "served")
    assert texts(tmp_path, "served") == texts(tmp_path, "local")
    for number, row in local.items():
        assert row["statuses"] == served[number]["statuses"]
        # FastChat counts one completion token too few unless it stopped by itself; prompts must be the same tokens
        assert [turn[0] for turn in row["tokens"]] == [turn[0] for turn in served[number]["tokens"]]
