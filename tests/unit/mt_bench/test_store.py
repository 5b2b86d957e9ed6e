"""Answer and judgment files, and FastChat's own show_result on them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mt_bench_goldens import Golden
from mt_bench_helpers import judge, write_answer_file
from salient_eval.mt_bench import pairs, statistics
from salient_eval.mt_bench.questions import load_question_set
from salient_eval.mt_bench.store import (
    Layout,
    check_model_name,
    file_name,
    load_answers,
    merge_judgments,
    read_rows,
    write_answers,
)
from scripted_judge import ScriptedJudge


def test_answers_are_reorganised_as_fastchat_does(golden: Golden, tmp_path: Path) -> None:
    write_answers(tmp_path / "a.jsonl", read_rows(golden.folder / "answers_unsorted.jsonl"))
    assert (tmp_path / "a.jsonl").read_bytes() == (golden.folder / "answers_reorg_expected.jsonl").read_bytes()


def test_statuses_are_read_and_what_is_no_answer_is_recognised(tmp_path: Path) -> None:
    rows = [
        {"question_id": 1, "choices": [{"turns": ["fine", "$ERROR$"]}]},
        {"question_id": 2, "choices": [{"turns": ["ERROR", "  "]}]},
        {
            "question_id": 3,
            "choices": [{"turns": ["cut", "fine"]}],
            "statuses": ["truncated", "ok"],
            "template": "vicuna",
        },
        {"question_id": 1, "choices": [{"turns": ["later\u2028line", "fine"]}]},
    ]
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    found = load_answers(path)
    assert {q: a.statuses for q, a in found.items()} == {
        1: ("ok", "ok"),
        2: ("failed", "empty"),
        3: ("truncated", "ok"),
    }
    assert found[1].turns[0] == "later\u2028line" and found[3].extra == {"template": "vicuna"}
    rows[2]["statuses"] = ["cut", "ok"]
    path.write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(ValueError, match="cut"):
        load_answers(path)
    with pytest.raises(ValueError, match="that folder has answers of ..m"):
        load_answers(tmp_path / "x.jsonl")


def test_merging_keeps_other_models_and_replaces_the_same_measurement(tmp_path: Path) -> None:
    path = tmp_path / "j_single.jsonl"
    row = {"question_id": 1, "model": "a", "judge": ["j", "p"], "turn": 1, "score": 3}
    merge_judgments(path, [row, {**row, "model": "b"}])
    assert merge_judgments(path, iter([{**row, "score": 9}, {**row, "repeat": 1}])) == 2
    found = list(read_rows(path))
    assert [(r["model"], r["score"], r.get("repeat")) for r in found] == [("b", 3, None), ("a", 9, None), ("a", 3, 1)]
    assert [p.name for p in tmp_path.iterdir() if not p.name.startswith(".")] == ["j_single.jsonl"]


def test_a_pair_is_stored_once_whichever_model_is_named_first(tmp_path: Path) -> None:
    """pair-baseline names the baseline last, pair-all goes by name; both show both orders to the judge."""
    path = tmp_path / "j_pair.jsonl"
    row = {"question_id": 1, "judge": ["j", "p"], "turn": 1, "g1_winner": "tie", "g2_winner": "tie"}
    merge_judgments(path, [row | {"model_1": "b", "model_2": "a"}, row | {"model_1": "b", "model_2": "c"}])
    merge_judgments(path, [row | {"model_1": "a", "model_2": "b"}])
    assert [(r["model_1"], r["model_2"]) for r in read_rows(path)] == [("b", "c"), ("a", "b")]
    assert pairs.summarise_pairs(read_rows(path)).matches == 2


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    row = {"question_id": 1, "model": "a", "judge": ["j", "p"], "turn": 1, "score": 3}
    merge_judgments(path, [row])
    before = path.read_bytes()

    def broken():  # type: ignore[no-untyped-def]
        yield {**row, "score": 4}
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        merge_judgments(path, broken())
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", ["500", "1e3", "-2.5", "", "a/b", ".hidden"])
def test_model_names_that_break_readers_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="model name"):
        check_model_name(name)


def test_corrected_references_have_a_file_of_their_own() -> None:
    layout = Layout(Path("d"), "mt_bench")
    assert layout.judgments("org/j", "single").name == "org--j_single.jsonl"
    assert layout.judgments("j", "single", "corrected").name == "j.corrected_single.jsonl"
    assert file_name("gpt-4o_x y") == "gpt-4o--x--y" or "/" not in file_name("gpt-4o_x y")


def show_result(*arguments: str) -> str:
    """FastChat's own program on our files."""
    done = subprocess.run(
        [sys.executable, "-m", "fastchat.llm_judge.show_result", *arguments],
        capture_output=True, text=True, env={**os.environ, "LOGDIR": ""}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fastchats_show_result_reads_our_files_and_agrees(judge_server: ScriptedJudge, tmp_path: Path) -> None:
    layout = Layout(tmp_path, "salient_own")
    own = load_question_set("own")
    models = ("alpha", "beta", "gamma")
    for model in models:
        write_answer_file(layout, own, model)
    judge_server.faults = {3: "null", 5: "garble"}
    for kind, mode in (("single", "single"), ("pair", "pair-all")):
        _, rows, _ = judge(judge_server.url, tmp_path / kind, models, mode=mode)
        merge_judgments(layout.judgments("judge-x", kind), rows)

    printed = show_result("--input-file", str(layout.judgments("judge-x", "single")))
    tables = statistics.score_tables(read_rows(layout.judgments("judge-x", "single")))
    first, second, average = re.split(r"#{10}[\w ]+#{10}", printed)[1:]
    for model, table in tables.items():
        for part, value in ((first, table.select(turn=1).mean()), (second, table.select(turn=2).mean())):
            assert float(re.search(rf"{model}\s+[12]\s+([\d.]+)", part)[1]) == pytest.approx(value, abs=1e-5)  # type: ignore[index]
        pooled = statistics.pooled_mean(table.scores_QT)
        assert float(re.search(rf"{model}\s+([\d.]+)", average)[1]) == pytest.approx(pooled, abs=1e-5)  # type: ignore[index]
    assert sum(table.counts.get("graded", 0) for table in tables.values()) == 94

    counts = pairs.pair_counts(pairs.summarise_pairs(read_rows(layout.judgments("judge-x", "pair"))).battles)
    printed = show_result("--input-file", str(layout.judgments("judge-x", "pair")), "--mode", "pairwise-all")
    for model, count in counts.items():
        found = re.search(rf"{model}\s+(\d+)\s+(\d+)\s+(\d+)", printed)
        assert found and [int(n) for n in found.groups()] == [count.win, count.loss, count.tie]
