"""Reports and commands: what is shown, what is withheld, and that texts of models are data."""

from __future__ import annotations

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from mt_bench_goldens import Golden
from mt_bench_helpers import write_answer_file
from salient_eval.mt_bench import doctor, html, markdown, plots
from salient_eval.mt_bench import report as reports
from salient_eval.mt_bench.cli import app
from salient_eval.mt_bench.client import JudgeClient
from salient_eval.mt_bench.questions import load_question_set
from salient_eval.mt_bench.report_options import ReportOptions
from salient_eval.mt_bench.store import Layout, read_rows, write_answers
from scripted_judge import ScriptedJudge, rate_by_hash
from typer.testing import CliRunner

RUNNER = CliRunner()


def run(*arguments: str, code: int = 0) -> str:
    result = RUNNER.invoke(app, list(arguments))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    place = Layout(tmp_path / "data", "salient_own")
    for model in ("alpha", "beta"):
        write_answer_file(place, load_question_set("own"), model, template="vicuna_v1.1")
    return place


def judged(layout: Layout, server: ScriptedJudge, *more: str) -> str:
    return run("judge", "--data", str(layout.data), "--questions", "own", "--judge-model", "judge-x", "--base-url",
               server.url, *more)  # fmt: skip


def reported(layout: Layout, out: Path, *more: str, code: int = 0) -> dict[str, Any]:
    run("report", "--out", str(out), "--data", str(layout.data), "--questions", "own", "--judge-model", "judge-x",
        "--draws", "100", *more, code=code)  # fmt: skip
    return json.loads((out / "report.json").read_text()) if code == 0 else {}


def test_from_answers_to_every_report_file(layout: Layout, judge_server: ScriptedJudge, tmp_path: Path) -> None:
    printed = judged(layout, judge_server)
    assert "64" in printed and "sha256" in printed
    judged(layout, judge_server, "--mode", "pair-baseline", "--baseline", "alpha")
    out = tmp_path / "out"
    result = reported(layout, out)
    names = {"report.json", "report.md", "report.html", "radar.png", "radar.svg", "bars.png", "bars.svg"}
    assert {file.name for file in out.iterdir()} == names
    assert result["title"] == "salient_own (not MT-Bench)" and "MT-Bench score" not in (out / "report.html").read_text()
    entry = result["single"]["models"][0]
    assert entry["average_pooled"]["graded"] == 32 and len(entry["categories"]) == 8
    assert entry["template"] == "vicuna_v1.1" and entry["length"]["mean_characters"] > 0
    assert result["provenance"]["templates"] == {"alpha": "vicuna_v1.1", "beta": "vicuna_v1.1"}
    assert result["pair"]["matches"] == 32 and len(result["single"]["differences"]) == 1
    assert result["provenance"]["judge_models_answering"] == {"judge-x-0613": 64 + 64}
    assert (out / "radar.png").read_bytes()[:4] == b"\x89PNG" and "<svg" in (out / "radar.svg").read_text()
    text = (out / "report.md").read_text()
    assert all(model in text for model in ("alpha", "beta")) and "(32/0/0)" in text


def test_repeats_are_reported(layout: Layout, judge_server: ScriptedJudge, tmp_path: Path) -> None:
    judge_server.reply = lambda body: f"Rating: [[{judge_server.total % 2 + 4}]]"
    judged(layout, judge_server, "--repeats", "2", "--concurrency", "1")
    assert judge_server.total == 128
    reported(layout, tmp_path / "out")
    for name in ("report.md", "report.html"):
        assert "Standard deviation of a verdict over its repeats" in (tmp_path / "out" / name).read_text()


def test_the_same_files_give_the_same_report(layout: Layout, judge_server: ScriptedJudge, tmp_path: Path) -> None:
    judged(layout, judge_server)
    for name in ("one", "two"):
        reported(layout, tmp_path / name)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_no_average_above_the_failure_limit(layout: Layout, judge_server: ScriptedJudge, tmp_path: Path) -> None:
    judge_server.fault_for = lambda body, seen: "garble" if "alpha says a900" in str(body) else None
    judged(layout, judge_server)
    models = {m["model"]: m for m in reported(layout, tmp_path / "strict")["single"]["models"]}
    bad = models["alpha"]
    assert bad["average_pooled"] == {"mean": None, "graded": 14, "unparsed": 18, "failed": 0, "interval": None}
    assert bad["average_of_turns"] is None and bad["standard_error"] is None
    assert bad["pooled_if_failures_scored_1"] is not None and models["beta"]["average_pooled"]["mean"] is not None
    assert bad["categories"]["writing"]["both"]["mean"] is None
    result = reports.build_report(layout, "judge-x", "own", ReportOptions(max_failure_rate=0.6, draws=50))
    assert {m["model"]: m["average_pooled"]["mean"] for m in result["single"]["models"]}["alpha"] is not None
    page = (tmp_path / "strict/report.html").read_text()
    assert "18 verdicts are missing" in page and "not given" in page
    assert "no average: too many failures" in plots.to_svg(
        plots.bars(json.loads((tmp_path / "strict/report.json").read_text()))
    )


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        self.attributes += attrs


def test_the_page_stands_alone_and_runs_nothing(layout: Layout, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)> {{ 7*7 }}"
    rows = list(read_rows(layout.answers("alpha")))
    rows[0]["choices"][0]["turns"][0] = evil
    write_answers(layout.answers("alpha"), rows)
    with ScriptedJudge(lambda body: evil + " " + rate_by_hash(body)) as server:
        judged(layout, server)
    reported(layout, tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    tags = _Tags()
    tags.feed(page)
    assert not {"script", "img", "link", "iframe"} & set(tags.seen) and tags.seen["svg"] == 2
    assert "&lt;script&gt;" in page and "{{ 7*7 }}" in page
    loaded = [v for k, v in tags.attributes if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]
    assert not loaded and not re.search(r"url\((?!#)", page)


def test_numbers_made_in_different_ways_are_not_mixed(
    layout: Layout, judge_server: ScriptedJudge, tmp_path: Path
) -> None:
    judged(layout, judge_server, "--model", "alpha")
    judged(layout, judge_server, "--model", "beta", "--temperature", "0.5")
    reported(layout, tmp_path / "out", code=2)
    options = ReportOptions(draws=50, models=("beta",))
    assert len(reports.build_report(layout, "judge-x", "own", options)["single"]["models"]) == 1


def test_dry_run_and_limits_from_the_command_line(layout: Layout, judge_server: ScriptedJudge) -> None:
    prices = ("--price-prompt", "30", "--price-completion", "60")
    printed = judged(layout, judge_server, "--dry-run", *prices)
    assert "nothing was asked" in printed and "dollars ceiling" in printed and judge_server.total == 0
    base = ("judge", "--data", str(layout.data), "--questions", "own", "--base-url", judge_server.url)
    printed = run(*base, "--judge-model", "judge-x", "--max-cost", "0.2", *prices, code=3)
    assert "stopped early" in printed and 0 < judge_server.total < 64
    assert "go together" in run(*base, "--price-prompt", "30", code=2)
    assert "must be a number" in run(*base, "--temperature", "warm", code=2)
    assert "that folder has answers of" in run(*base, "--model", "nobody", code=2)


def test_a_wrong_key_stops_with_one_sentence_and_no_secret(
    layout: Layout, judge_server: ScriptedJudge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-my-own-secret")
    judge_server.fault_for = lambda body, seen: "401"
    printed = run("judge", "--data", str(layout.data), "--questions", "own", "--judge-model", "judge-x", "--base-url",
                  judge_server.url, code=3)  # fmt: skip
    assert "stopped early" in printed and "OPENAI_API_KEY" in printed and "Traceback" not in printed
    files = b"".join(file.read_bytes() for file in layout.data.rglob("*") if file.is_file())
    assert b"secret" not in files and "secret" not in printed


def test_report_of_fastchats_own_file(golden: Golden, tmp_path: Path) -> None:
    layout = Layout(tmp_path, "mt_bench")
    target = layout.judgments("gpt-4", "single")
    target.parent.mkdir(parents=True)
    target.write_bytes((golden.folder / "judgments_single.jsonl").read_bytes())
    layout.judgments("gpt-4", "pair").write_bytes((golden.folder / "judgments_pair.jsonl").read_bytes())
    categories = {q.question_id: q.category for q in golden.questions.questions}
    options = ReportOptions(draws=100, categories=categories, max_failure_rate=0.15)
    result = reports.build_report(layout, "gpt-4", "gpt-4", options)
    theirs = golden.read("show_result_single.json")["judgments_single"]["tables"]
    best_first = [row["model"] for row in sorted(theirs["average"], key=lambda row: -row["score"])]
    assert [m["model"] for m in result["single"]["models"]] == best_first == ["model-c", "model-b", "model-a"]
    assert result["score_name"] == "MT-Bench score"
    assert isinstance(result["pair"]["bradley_terry"], dict)
    (first,) = (row["score"] for row in theirs["first_turn"] if row["model"] == "model-c")
    counts = f"{len(categories) - golden.unparsed[0]}/{golden.unparsed[0]}/0"
    assert f"| model-c | {first:.2f} ({counts})" in markdown.to_markdown(result)
    assert "<svg" in html.to_html(result, html.collect_cases(layout, result, "gpt-4", {}))
    with pytest.raises(ValueError, match="gpt-4_single.jsonl"):
        reports.build_report(layout, "nobody", "gpt-4", options)


def test_agree_command(golden: Golden, tmp_path: Path) -> None:
    files = [str(golden.folder / name) for name in ("votes_gpt4_pair.json", "votes_human.json")]
    printed = run("agree", *files, "--out", str(tmp_path / "a.json"))
    counts = golden.read("compute_agreement.json")["gpt4-pair vs human"]["counts"]
    for agreed, total in counts.values():
        assert f"{agreed / total:.1%}" in printed
    rows = json.loads((tmp_path / "a.json").read_text())
    assert [row["turn"] for row in rows] == [1, 2, None] and rows[0]["agree_with_ties"] == counts["turn1_with_tie"][0]


def honest(body: dict[str, Any]) -> str:
    """A judge that knows the right answers and looks at nothing else."""
    text = body["messages"][-1]["content"]
    right = ("150 litres when full", "1/4. Exactly one head")
    if "[[A]]" in body["messages"][0]["content"]:
        a, b = text.split("<answer of assistant B>")
        good = [any(r in part.split("</reference>")[-1] for r in right) for part in (a, b)]
        return "Verdict: [[C]]" if good[0] == good[1] else f"Verdict: [[{'A' if good[0] else 'B'}]]"
    answer = text.split("</reference>")[1]
    return f"Rating: [[{9 if any(r in answer for r in right) else 2}]]"


def test_doctor_passes_an_honest_judge_and_catches_a_fooled_one(tmp_path: Path) -> None:
    arguments = ("doctor", "--questions", "own", "--judge-model", "j", "--no-samples", "--base-url")
    with ScriptedJudge(honest) as server:
        printed = run(*arguments, server.url)
        assert "NO" not in printed and server.total == 14
    with ScriptedJudge(lambda body: "I like it. Rating: [[10]] [[A]]") as server:
        printed = run(*arguments, server.url, code=4)
        assert "NO" in printed


def test_doctor_shows_one_prompt_per_template(judge_server: ScriptedJudge) -> None:
    own = load_question_set("own")
    shown = dict(doctor.samples(own))
    assert len(shown) == 8 and all("<answer" in m[-1]["content"] for m in shown.values())
    assert all(check.passed for check in doctor.file_checks(own))
    printed = run("doctor", "--questions", "own", "--no-probe")
    assert "own-pair-ref-turn2" in printed and judge_server.total == 0


def test_doctor_shows_how_a_model_is_prompted(tiny_llama: Path) -> None:
    common = ("doctor", "--questions", "own", "--no-probe", "--model", str(tiny_llama))
    printed = run(*common, "--template", "alpaca")
    turn_1, turn_2 = (part.partition("## Response:")[2] for part in printed.split("alpaca, turn ")[1:])
    assert not turn_1.strip("─ \n#") and "<answer 1 of the model></s>" in turn_2
    assert "template alpaca (nothing recorded at training)" in printed
    assert "give --template" in run(*common, code=2)


def test_options_that_commands_share_are_the_same_in_each() -> None:
    shown = {name: " ".join(run(name, "--help").split()) for name in ("judge", "report", "doctor")}
    for option in ("--questions-path", "--references", "--judge-model"):
        assert all(option in text for text in shown.values()), option
    for option in ("--api-key-env", "--token-parameter", "--merge-system", "--attempts"):
        assert option in shown["judge"] and option in shown["doctor"] and option not in shown["report"], option
    assert "No such option" in run("judge", "--target", "x", code=2)


def test_doctor_probe_reports_a_failing_call(judge_server: ScriptedJudge) -> None:
    from mt_bench_helpers import endpoint

    judge_server.fault_for = lambda body, seen: "500"
    client = JudgeClient(endpoint(judge_server.url, max_attempts=1))
    results = doctor.probe(client, load_question_set("own"))
    client.close()
    assert len(results) == 14 and not any(check.passed for check in results)
    assert all("HTTP 500" in check.found for check in results)
