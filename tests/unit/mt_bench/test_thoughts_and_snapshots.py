"""Thoughts stay out of answers, conversations and prompts; several snapshots of a judge are said to be several."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from mt_bench_helpers import write_answer_file
from salient_eval.mt_bench.answer_facts import fingerprint_notes, snapshot_notes
from salient_eval.mt_bench.answer_file import TurnResult, with_thought_apart
from salient_eval.mt_bench.cli import app
from salient_eval.mt_bench.parsers import strict_rating, strict_winner
from salient_eval.mt_bench.questions import load_question_set
from salient_eval.mt_bench.store import Layout, load_answers, read_rows, write_answers
from scripted_judge import ScriptedJudge, rate_by_hash
from typer.testing import CliRunner


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.output


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    place = Layout(tmp_path / "data", "salient_own")
    write_answer_file(place, load_question_set("own"), "alpha")
    return place


def replace_turns(layout: Layout, turns: list[str], **more: Any) -> None:
    rows = list(read_rows(layout.answers("alpha")))
    for row in rows:
        row["choices"][0]["turns"] = turns
        row.update(more)
    write_answers(layout.answers("alpha"), rows)


@pytest.mark.parametrize(
    ("text", "visible", "thought", "status"),
    [
        ("<think>4 or 5?</think>\n\nIt is 5.", "It is 5.", "4 or 5?", "ok"),
        ("so it is 5</think>It is 5.", "It is 5.", "so it is 5", "ok"),
        ("<think>4 or", "", "4 or", "empty"),
        ("  It is 5. ", "  It is 5. ", "", "ok"),
        ("Write `</think>` at the end.", "Write `</think>` at the end.", "", "ok"),
    ],
)
def test_thoughts_within_an_answer_file(layout: Layout, text: str, visible: str, thought: str, status: str) -> None:
    replace_turns(layout, [text, "fine"])
    answer = next(iter(load_answers(layout.answers("alpha")).values()))
    assert (answer.turns[0].strip(), answer.statuses[0]) == (visible.strip(), status)
    assert answer.extra.get("thoughts", ["", ""])[0] == thought
    kept = next(iter(load_answers(layout.answers("alpha"), keep_thoughts=True).values()))
    assert kept.turns[0] == text


def test_thoughts_kept_apart_are_shown_to_the_judge_on_request_only(layout: Layout) -> None:
    replace_turns(layout, ["It is 5.", "<think>inline</think>Yes."], thoughts=["apart", ""])
    for more, shown in ((), False), (("--keep-thoughts",), True):
        with ScriptedJudge(rate_by_hash) as server:
            run("judge", "--data", str(layout.data), "--questions", "own", "--judge-model", f"j{shown}", "--base-url",
                server.url, *more)  # fmt: skip
            asked = [body["messages"][-1]["content"] for body in server.bodies]
        assert all("It is 5." in text for text in asked)
        second = [text for text in asked if "Yes." in text]
        assert second and all(("inline" in text) == shown for text in second)
        assert all(("apart" in text) == shown for text in asked)


def test_a_local_answer_keeps_its_thought_apart() -> None:
    whole = with_thought_apart(TurnResult("<think>hm</think>\n\nYes.", "ok", "", 3, 9))
    assert (whole.text, whole.thought, whole.status, whole.completion_tokens) == ("Yes.", "hm", "ok", 9)
    cut = with_thought_apart(TurnResult("<think>hm", "truncated", "cut after 9 tokens", 3, 9))
    assert (cut.text, cut.thought, cut.status) == ("", "hm", "failed") and "cut after 9 tokens" in cut.reason
    plain = TurnResult("No tags here.", "truncated", "cut", 3, 9)
    assert with_thought_apart(plain) is plain


def test_a_judge_that_moves_to_another_snapshot_is_noticed(layout: Layout, tmp_path: Path) -> None:
    with ScriptedJudge(rate_by_hash) as server:
        run("judge", "--data", str(layout.data), "--questions", "own", "--judge-model", "j", "--base-url", server.url)
    file = layout.judgments("j", "single", "own")
    rows = list(read_rows(file))
    assert snapshot_notes(rows) == []
    report = (
        "report",
        "--data",
        str(layout.data),
        "--questions",
        "own",
        "--judge-model",
        "j",
        "--draws",
        "20",
        "--out",
    )
    run(*report, str(tmp_path / "one"), "--one-snapshot")
    for row in rows[:5]:
        row["meta"]["model"] = "judge-x-1106"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = run(*report, str(tmp_path / "two"))
    for place in (output, (tmp_path / "two/report.md").read_text(), (tmp_path / "two/report.html").read_text()):
        assert "judge-x-1106 (5 replies)" in place.replace("\n", " ")
    assert "--one-snapshot" in run(*report, str(tmp_path / "three"), "--one-snapshot", code=2)


LABELS = ("Rating", "**Rating**", "Score", "Final rating", "Overall score", "Bewertung", "Note", "评分", "My rating")
FORMS = ("[[{}]]", "**[[{}]]**", "`[[{}]]`", "[[ {} ]]", "[[**{}**]]", "【【{}】】", "\\[\\[{}\\]\\]", "[[{}/10]]")
ASIDES = (
    "A perfect answer would have been [[10]].",
    "The scale goes from [[1]] to [[10]].",
    "Without the mistake I would have given [[9]].",
)


def test_the_last_labelled_rating_wins_in_every_form() -> None:
    draw = random.Random(5)
    for _ in range(600):
        wanted, earlier = draw.randint(1, 10), draw.randint(1, 10)
        said = f"{draw.choice(LABELS)}: {draw.choice(FORMS).format(wanted)}"
        parts = ["The answer is clear and short."]
        if draw.random() < 0.5:
            parts.append(f"{draw.choice(LABELS)}: {draw.choice(FORMS).format(earlier)}")
            parts.append("On reflection:")
        parts.append(said)
        if draw.random() < 0.4:
            parts.append(draw.choice(ASIDES))
        text = draw.choice((" ", "\n", "\n\n")).join(parts)
        assert strict_rating(text) == wanted, text


def test_ratings_out_of_range_or_contradicting_are_no_rating() -> None:
    draw = random.Random(6)
    for _ in range(200):
        bad = draw.choice((0, 11, 42, 100))
        assert "out of range" in str(strict_rating(f"{draw.choice(LABELS)}: [[{bad}]]"))
        one, two = draw.sample(range(1, 11), 2)
        assert "ambiguous" in str(strict_rating(f"Clarity [[{one}]] and depth [[{two}]] as I see it"))
        for joint in (" or ", ", depth ", " / ", " for style, "):
            assert "ambiguous" in str(strict_rating(f"It is [[{one}]]{joint}[[{two}]]")), joint
        assert strict_rating(f"At first [[{one}]]. After all of that, [[{two}]]") == two


def test_the_last_labelled_winner_wins_in_every_form() -> None:
    draw = random.Random(7)
    for _ in range(400):
        wanted, other = draw.sample("AB", 2)
        shown = draw.choice((wanted, wanted.lower(), f" {wanted} "))
        label = draw.choice(("Final verdict", "**Final verdict**", "My verdict", "Verdict"))
        text = f"{label}: {draw.choice(('[[{}]]', '**[[{}]]**', '`[[{}]]`')).format(shown)}"
        if draw.random() < 0.4:
            text += f". With working code {other} would have been [[{other}]]."
        assert strict_winner(text)[0] == wanted, text


def test_a_comparison_is_no_verdict_for_the_one_named_last() -> None:
    assert strict_winner("[[A]] is better than [[B]]")[0] is None
    assert strict_winner("[[A]] and [[B]] are equal: [[C]]")[0] == "tie"


def test_fingerprints_that_change_are_noted() -> None:
    one = {"system_fingerprints": {"fp_1": 3, "": 1}, "judge_models_answering": {"j": 4}}
    assert fingerprint_notes(one) == []
    assert "fp_1, fp_2" in fingerprint_notes(one | {"system_fingerprints": {"fp_1": 3, "fp_2": 1}})[0]
