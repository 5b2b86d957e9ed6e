"""Parts of a report: missing verdicts, pairing, cut answers, order, style, categories, a panel of judges."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from salient_eval.mt_bench import answer_facts, html, markdown, pair_report, plots, sources, style
from salient_eval.mt_bench import report as reports
from salient_eval.mt_bench.cli import app
from salient_eval.mt_bench.report_options import ReportOptions
from salient_eval.mt_bench.store import Answer, Layout
from typer.testing import CliRunner

OPTIONS = ReportOptions(draws=50, max_failure_rate=0.2)


def single_rows(model: str, scores: list[list[float]]) -> list[dict[str, Any]]:
    """Rows of two turns; a score of -1 is a missing verdict. Questions come in tens by category."""
    return [
        {"question_id": q, "model": model, "judge": ["j", "single-v1"], "turn": turn + 1, "score": score,
         "category": "writing" if q < 10 else "math", "tstamp": 86400.0 * (20000 + q)}
        for q, turns in enumerate(scores) for turn, score in enumerate(turns)
    ]  # fmt: skip


def test_one_missing_verdict_leaves_the_category_and_the_radar_whole() -> None:
    rows = single_rows("a", [[6, 6]] * 9 + [[6, -1]] + [[4, 4]] * 10)
    part = reports.single_part(rows, {}, ReportOptions(draws=50))
    (entry,) = part["models"]
    cell = entry["categories"]["writing"]["turn_2"]
    assert (cell["mean"], cell["graded"], cell["unparsed"]) == (6.0, 9, 1)
    figure = plots.radar({"single": part, "score_name": "s", "judge": "j"})
    line = figure.axes[0].lines[0].get_xydata()
    assert len(line) == 3 and line[0].tolist() == line[-1].tolist(), "closed over both categories"
    hollow = [mark.get_markerfacecolor() for mark in figure.axes[0].lines[1:]]
    assert hollow == ["white", plots.COLOURS[0]]


def test_a_category_without_most_of_its_verdicts_is_left_out() -> None:
    rows = single_rows("a", [[-1, -1]] * 6 + [[6, 6]] * 4 + [[4, 4]] * 30)
    (entry,) = reports.single_part(rows, {}, OPTIONS)["models"]
    assert entry["categories"]["writing"]["both"]["mean"] is None
    figure = plots.radar({"single": {"models": [entry]}, "score_name": "s", "judge": "j"})
    assert len(figure.axes[0].lines[0].get_xydata()) == 2


def test_a_note_says_which_answers_were_paired() -> None:
    first = single_rows("a", [[9, 9]] * 2 + [[5, 5]] * 8)
    second = single_rows("b", [[-1, -1]] * 2 + [[5, 4]] * 8)
    part = reports.single_part(first + second, {}, OPTIONS)
    (d,) = part["differences"]
    assert (d["mean"], d["questions"], d["answers"]) == (0.5, 8, 16)
    assert (d["first_mean"], d["second_mean"]) == (5.0, 4.5)
    (note,) = reports.pairing_notes(part)
    assert "5.80 and 4.50 over all graded answers of each, differ by +1.30" in note
    assert "+0.50, is over the 16 answers (8 questions)" in note and "5.00 and 4.50" in note
    whole = reports.single_part(single_rows("a", [[5, 5]] * 10) + single_rows("b", [[4, 5]] * 10), {}, OPTIONS)
    assert reports.pairing_notes(whole) == []


def answer(question: int, text: str, status: str = "ok", **extra: Any) -> Answer:
    return Answer(question, (text, text), (status, "ok"), extra)


def test_facts_of_the_answers() -> None:
    made = {"temperature": "fastchat", "model": {"kind": "adapter", "checkpoint": "step-8"}, "stop": []}
    given = {q: answer(q, "x", "truncated" if q < 3 else "ok", generation=made | {"n": q}, tstamp=86400.0 * q)
             for q in range(1, 11)}  # fmt: skip
    facts = answer_facts.answer_facts(given)
    assert facts["made"] == {"temperature": "fastchat", "model.kind": "adapter", "model.checkpoint": "step-8"}
    assert facts["dates"] == ["1970-01-02", "1970-01-11"] and (facts["truncated"], facts["turns"]) == (2, 20)
    (note,) = answer_facts.truncation_notes({"m": facts, "n": facts | {"truncated": 0}})
    assert note.startswith("m: 2 of 20 answers were cut off") and "--max-new-tokens" in note
    assert answer_facts.answer_facts({})["dates"] == []


def pair_rows(winners: list[tuple[str, str]], first: str = "a", second: str = "b") -> list[dict[str, Any]]:
    return [
        {"question_id": q, "turn": 1, "model_1": first, "model_2": second, "g1_winner": one, "g2_winner": two,
         "judge": ["j", "pair-v2"]}
        for q, (one, two) in enumerate(winners)
    ]  # fmt: skip


def test_orders_that_disagree_are_marked_and_categories_counted() -> None:
    rows = pair_rows([("model_1", "model_1")] * 3 + [("model_1", "model_2")] * 3 + [("error", "model_1")])
    names = {q: "writing" if q < 3 else "math" for q in range(7)}
    options = ReportOptions(draws=50, categories=names, max_failure_rate=0.5)
    part = pair_report.pair_part(rows, {}, options)
    assert all(m["orders_disagree"] == 0.5 and m["unstable"] for m in part["models"])
    assert part["categories"]["writing"]["a"] == {"win": 3, "loss": 0, "tie": 0, "win_rate_adjusted": 1.0}
    assert part["categories"]["math"]["b"]["tie"] == 3
    text = "\n".join(markdown._pair(part))
    assert "50.0% (!)" in text and markdown.UNSTABLE_NOTE in text and "100.0% (3/0/0)" in text
    calm = pair_report.pair_part(pair_rows([("model_1", "model_1"), ("model_2", "model_2")] * 3), {}, options)
    assert not any(m["unstable"] for m in calm["models"])


def test_style_of_an_answer() -> None:
    text = "# Title\n\n- one\n* two\n1. three\n**bold** and __strong__\n```\n# no heading\n- no item\n```"
    assert style.style_of(text) == [float(len(text)), 1.0, 3.0, 2.0]


def test_style_control_takes_away_what_length_explains() -> None:
    """The judge prefers the longer answer in 9 of 10 cases; model a is long in 8 of 10. Otherwise they are equal."""
    draw = random.Random(0)
    answers: dict[str, dict[int, Answer]] = {"a": {}, "b": {}}
    winners = []
    for q in range(2000):
        long = "a" if draw.random() < 0.8 else "b"
        for model in answers:
            answers[model][q] = answer(q, "word " * (200 if model == long else 60))
        preferred = long if draw.random() < 0.9 else "ab".replace(long, "")
        winners.append(("model_1", "model_1") if preferred == "a" else ("model_2", "model_2"))
    found = style.style_control(pair_rows(winners), answers, "b")
    assert isinstance(found, style.StyleControl) and found.comparisons == 2000
    assert found.ratings["a"] > 150 and found.ratings["b"] == found.controlled["b"] == 0
    assert abs(found.controlled["a"]) < 60 and found.weights["length"] > 1
    assert set(found.weights) == {"length"}, "features in which no answers differ have no weight"


def test_style_control_says_why_it_is_not_there() -> None:
    assert "there are 0" in str(style.style_control(pair_rows([("model_1", "model_1")] * 30), {}))
    text = "\n".join(markdown._pair(pair_report.pair_part(pair_rows([("tie", "tie")] * 4), {}, OPTIONS)))
    assert "Style control: needs 20 comparisons" in text


def test_texts_of_models_are_data_in_markdown() -> None:
    line = markdown.table(("model",), [["<img src=x onerror=alert(1)>|[x](javascript:alert(1))"]]).splitlines()[-1]
    assert "<img" not in line and "](" not in line and line.count(" |") == 1


@pytest.fixture
def judged(tmp_path: Path) -> Layout:
    """Two judges' verdicts on two models, singly and in comparisons."""
    layout = Layout(tmp_path / "data", "salient_own")
    folder = layout.judgments("x", "single", "own").parent
    folder.mkdir(parents=True)
    for judge, shift in (("x", 0), ("y", 1)):
        rows = [
            row | {"judge": [judge, "single-v1"], "question_id": 900 + row["question_id"]}
            for model, score in (("a", 6 + shift), ("b", 5 + shift))
            for row in single_rows(model, [[score, score - (q == 3)] for q in range(16)])
        ]
        texts = {"g1_judgment": "<b>because</b> of this", "g2_judgment": "and that"}
        winners = [("model_1", "model_1")] * 12 + [("model_1", "model_2" if shift else "tie")] * 4
        pairs = [
            row | texts | {"judge": [judge, "pair-v2"], "question_id": 900 + row["question_id"]}
            for row in pair_rows(winners)
        ]
        for kind, lines in (("single", rows), ("pair", pairs)):
            text = "".join(json.dumps(row) + "\n" for row in lines)
            layout.judgments(judge, kind, "own").write_text(text)
    return layout


def test_a_panel_of_judges(judged: Layout, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["report", "--out", str(out), "--data", str(judged.data), "--questions", "own",
                                      "--judge-model", "x", "--judge-model", "y", "--draws", "50"])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert (out / "x/report.html").is_file() and (out / "y/report.json").is_file()
    panel = json.loads((out / "panel.json").read_text())
    by_model = {entry["model"]: entry for entry in panel["models"]}
    averages = by_model["a"]["averages"]
    assert averages["y"] == averages["x"] + 1 and by_model["a"]["average"] == pytest.approx(averages["x"] + 0.5)
    (single, pair) = panel["agreement"]
    assert single["with_ties"] == 1.0 and (pair["comparisons"], pair["with_ties"]) == (16, 1.0)
    assert "Panel of 2 judges" in (out / "panel.md").read_text()


def test_the_page_shows_comparisons_and_questions_by_difference(judged: Layout) -> None:
    report = reports.build_report(judged, "x", "own", ReportOptions(draws=50))
    cases = html.collect_cases(judged, report, "own", {})
    ranked = html.by_spread(cases)
    assert len(ranked) == 16 and ranked[0]["spread"] == max(case["spread"] for case in cases)
    match = cases[-1]["comparisons"][0]
    assert match["verdict"] == "tie (orders disagree)" and [g["first"] for g in match["games"]] == ["a", "b"]
    page = html.to_html(report, cases)
    assert "&lt;b&gt;because&lt;/b&gt;" in page and "<b>because" not in page
    assert "Questions by difference" in page and 'href="#q900"' in page and 'id="q900"' in page


def test_origin_of_an_adapter_made_here(tmp_path: Path) -> None:
    record = {"method": "spectral", "total_rank": 9, "ranks": {"q": 9, "k": 0}, "versions": {"salient_ds": "1"},
              "source_run": "/home/me/runs/first/checkpoints/step-00000008"}  # fmt: skip
    (tmp_path / "salient_ds.json").write_text(json.dumps(record))
    source = sources.ModelSource("adapter", "base", tmp_path, "base", None)
    assert sources.origin_of(source) == {
        "method": "spectral", "total_rank": 9, "matrices": 2, "run": "first/step-00000008",
        "versions": {"salient_ds": "1"},
    }  # fmt: skip
    assert sources.origin_of(sources.ModelSource("model", "base", None, "base", None)) == {}


def test_missing_verdicts_do_not_hide_the_win_rates() -> None:
    rows = pair_rows([("model_1", "model_1")] * 15 + [("model_2", "model_2")] * 4 + [("error", "model_1")] * 2)
    part = pair_report.pair_part(rows, {}, ReportOptions(draws=50))
    (best, _) = part["models"]
    assert part["errors"] == 2 and best["win_rate_adjusted"] == pytest.approx(15 / 19) and best["interval"]
    hidden = pair_report.pair_part(rows, {}, ReportOptions(draws=50, max_cell_failure_rate=0.05))
    assert hidden["models"][0]["win_rate_adjusted"] is None


def test_the_head_names_judge_days_tokens_and_dollars() -> None:
    meta = {"model": "j-0613", "system_fingerprint": "fp", "prompt_tokens": 2_000_000, "completion_tokens": 500_000}
    provenance = reports.provenance([row | {"meta": meta} for row in single_rows("a", [[5, 5]])])
    head = dict(answer_facts.head_facts(provenance, (2.5, 10.0)))
    assert head["answered by"] == "j-0613" and head["fingerprints"] == "fp" and head["judged on"] == "2024-10-04"
    assert head["tokens"] == "4,000,000 in prompts, 1,000,000 in replies" and head["cost"].startswith("20.00 dollars")
    assert "cost" not in dict(answer_facts.head_facts(provenance, None))
