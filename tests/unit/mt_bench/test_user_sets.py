"""Question sets of the user in FastChat's format, from the files to the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mt_bench_helpers import write_answer_file
from raw_server import RawServer, completion
from salient_eval.mt_bench.answering import question_temperatures
from salient_eval.mt_bench.cli import app
from salient_eval.mt_bench.questions import OWN_FOLDER, QuestionSet
from salient_eval.mt_bench.store import Layout, read_rows
from salient_eval.mt_bench.user_sets import SetOptions, load_questions
from typer.testing import CliRunner

from salient_ds.host import file_sha256

JAPANESE: list[dict[str, Any]] = [
    {"question_id": 1, "category": "writing", "turns": ["\u4e00\u6587\u66f8\u3044\u3066\u3002", "\u3082\u3046"]},
    {"question_id": 2, "category": "math", "turns": ["2 \u00d7 3 \u306f?", "4 \u00d7 5 \u306f?"]},
    {"question_id": 7, "category": "stem", "turns": ["\u2028\u6c34", "\u6c37"], "required_temperature": 0.25},
]  # fmt: skip
VICUNA = [
    {"question_id": 1, "category": "generic", "turns": ["How do I rest well?"]},
    {"question_id": 2, "category": "common-sense", "turns": ["Why is night dark?"], "cluster": "ignored"},
    {"question_id": 3, "category": "math", "turns": ["What is 2 + 2?"]},
]
PROMPTS = [
    {"name": "single-v1", "system_prompt": "Be strict.", "prompt_template": "Q {question} A {answer} [[rating]]"},
    {"name": "single-math-v1", "system_prompt": "s", "prompt_template": "Q {question} R {ref_answer_1} A {answer}"},
    {"name": "single-v1-multi-turn", "system_prompt": "s", "prompt_template": "{question_2} {answer_1} {answer_2}"},
    {"name": "single-math-v1-multi-turn", "system_prompt": "s",
     "prompt_template": "{question_2} {ref_answer_2} {answer_1} {answer_2}"},
]  # fmt: skip


def lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return path


def references(path: Path, numbers: list[int], turns: int = 2) -> Path:
    return lines(path, [{"question_id": n, "choices": [{"turns": [f"r{t}" for t in range(turns)]}]} for n in numbers])


def fastchat_folder(folder: Path) -> Path:
    """Two sets as FastChat stores them."""
    lines(folder / "japanese_mt_bench/question.jsonl", JAPANESE)
    references(folder / "japanese_mt_bench/reference_answer/base-gpt4o-ref.jsonl", [2])
    lines(folder / "vicuna_bench/question.jsonl", VICUNA)
    references(folder / "vicuna_bench/reference_answer/gpt-4.jsonl", [3], turns=1)
    lines(folder / "judge_prompts.jsonl", PROMPTS)
    return folder


def load(*paths: Any, **options: Any) -> QuestionSet:
    return load_questions(SetOptions(str(Path(*paths)), **options))


def test_a_folder_like_fastchats_is_read_by_folder_file_or_bench_name(tmp_path: Path) -> None:
    data = fastchat_folder(tmp_path / "data")
    by_name = load(data, bench_name="japanese_mt_bench")
    for found in (by_name, load(tmp_path, bench_name="japanese_mt_bench"), load(data, "japanese_mt_bench"),
                  load(data, "japanese_mt_bench/question.jsonl")):  # fmt: skip
        assert (found.bench, found.reference_name, found.questions) == (
            "japanese_mt_bench", "base-gpt4o-ref", by_name.questions)  # fmt: skip
    assert [q.needs_reference for q in by_name.questions] == [False, True, False]
    assert by_name.questions[2].turns[0].startswith("\u2028"), "no end of a line"
    assert by_name.sha256["judge_prompts.jsonl"] == file_sha256(data / "judge_prompts.jsonl")
    assert set(by_name.sha256) == {"question.jsonl", "reference_answer/base-gpt4o-ref.jsonl", "judge_prompts.jsonl"}
    assert "(not MT-Bench)" in by_name.title
    with pytest.raises(ValueError, match="give --bench-name, one of .'japanese_mt_bench', 'vicuna_bench'"):
        load(data)
    assert load(data, "vicuna_bench/question.jsonl", bench_name="mine").bench == "mine"


def test_temperatures_come_from_the_file_the_category_or_the_command(tmp_path: Path) -> None:
    japanese = load(fastchat_folder(tmp_path), "japanese_mt_bench").questions
    vicuna = load(tmp_path, "vicuna_bench").questions
    assert question_temperatures("mt_bench", japanese) == {1: 0.7, 2: 0.0, 7: 0.25}
    assert question_temperatures("mt_bench", vicuna) == {1: 0.7, 2: 0.7, 3: 0.0}
    assert question_temperatures("0.5", japanese) == {1: 0.5, 2: 0.5, 7: 0.5}
    assert question_temperatures("stem=0.9", japanese) == {1: 0.7, 2: 0.0, 7: 0.9}
    assert question_temperatures("common-sense=0", vicuna) == {1: 0.7, 2: 0.0, 3: 0.0}
    with pytest.raises(ValueError, match="'stem', which is none of generic"):
        question_temperatures("stem=0.9", vicuna)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (["{"], "line 1: Expecting"), (["[1]"], "line 1: this is no JSON object"), ([], "holds no question"),
        (["[" * 50_000], "line 1"), ([VICUNA[0], {**VICUNA[1], "turns": []}], "line 2: turns must be"),
        ([{**VICUNA[0], "turns": ["a", "b", "c"]}], "one or two texts"), ([{**VICUNA[0], "turns": "ab"}], "one or two"),
        ([{**VICUNA[0], "turns": [" "]}], "one or two"), ([{**VICUNA[0], "turns": [3]}], "one or two"),
        ([{**VICUNA[0], "question_id": "x1"}], "whole number"), ([{**VICUNA[0], "question_id": True}], "whole number"),
        ([{**VICUNA[0], "question_id": 10**40}], "whole number"), ([VICUNA[0], VICUNA[0]], "occurs twice"),
        ([{**VICUNA[0], "category": 3}], "category"), ([{**VICUNA[0], "required_temperature": "hot"}], "temperature"),
        (['{"question_id": 1, "turns": ["a"], "required_temperature": NaN}'], "from 0 to 10"),
        ([{**VICUNA[2], "question_id": 9}], "questions .9. of .* .math. are judged with a reference"),
    ],
)  # fmt: skip
def test_wrong_files_are_named_by_line(rows: list[Any], words: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "set" / "question.jsonl", rows)
    with pytest.raises(ValueError, match=words):
        load(file)


def test_references_are_chosen_by_name_and_must_be_complete(tmp_path: Path) -> None:
    folder = fastchat_folder(tmp_path) / "japanese_mt_bench"
    references(folder / "reference_answer/mine.jsonl", [2])
    with pytest.raises(ValueError, match="has .'base-gpt4o-ref', 'mine'."):
        load(folder)
    assert load(folder, references="mine").reference_name == "mine"
    references(folder / "reference_answer/mine.jsonl", [2], turns=1)
    with pytest.raises(ValueError, match="none for all of their turns"):
        load(folder, references="mine")
    found = load(folder, references="mine", reference_categories=("none",))
    assert not any(q.needs_reference for q in found.questions)
    lines(folder / "reference_answer/mine.jsonl", [{"question_id": 2, "choices": []}])
    with pytest.raises(ValueError, match="line 1: choices"):
        load(folder, references="mine")
    assert load(folder, references="").references == {}, "generate needs none"


def test_the_name_of_mt_bench_is_never_given_to_another_set(tmp_path: Path) -> None:
    file = lines(tmp_path / "mt_bench" / "question.jsonl", VICUNA[:2])
    assert load(file).bench == f"mt_bench-{file_sha256(file)[:8]}" and "not MT-Bench" in load(file).title
    with pytest.raises(ValueError, match="pinned set"):
        load(file, bench_name="mt_bench")
    for bad in ("../x", ".x", "a/b", ""):
        with pytest.raises(ValueError, match="folder name|no question.jsonl"):
            load(file, bench_name=bad or " ")
    with pytest.raises(ValueError, match="go with --questions PATH"):
        load_questions(SetOptions("own", bench_name="x"))
    with pytest.raises(ValueError, match="no such file or folder"):
        load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "line 1"), ({"name": "single-v1"}, "needs name, system_prompt"), ([1], "needs name"),
        ({**PROMPTS[0], "system_prompt": None}, "must be texts"), ({**PROMPTS[0], "name": "other"}, "have none of"),
        ({**PROMPTS[0], "prompt_template": "{question} {answer} {anser}"}, "unknown placeholders .'anser'."),
        ({**PROMPTS[0], "prompt_template": "{question}"}, "does not show .'answer'."),
    ],
)  # fmt: skip
def test_wrong_prompt_files_are_refused(row: Any, words: str, tmp_path: Path) -> None:
    file = lines(tmp_path / "prompts.jsonl", [row])
    with pytest.raises(ValueError, match=words):
        load_questions(SetOptions("own", judge_prompts=str(file)))


def cli(*arguments: Any) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, (result.output, result.exception)
    return " ".join(result.output.split())


def test_a_set_of_the_user_from_answers_to_report(tmp_path: Path) -> None:
    sets, data = fastchat_folder(tmp_path / "sets"), tmp_path / "data"
    where = ("--questions", sets, "--bench-name", "vicuna_bench", "--data", data)
    with RawServer(lambda request: completion(f"Said. Rating: [[{request.number % 9 + 1}]]")) as server:
        cli("generate", *where, "--endpoint", server.url, "--model-name", "m", "--model-id", "m")
        assert sorted(r.body["temperature"] for r in server.requests) == [0.0, 0.7, 0.7]
        judge = ("--judge-model", "j", "--base-url", server.url)
        cli("judge", *where, *judge)
    rows = list(read_rows(Layout(data, "vicuna_bench").judgments("j", "single")))
    assert [(r["question_id"], r["judge"][1]) for r in rows] == [
        (1, "single-v1"), (2, "single-v1"), (3, "single-math-v1")]  # fmt: skip
    assert rows[0]["bench"] == "vicuna_bench" and rows[0]["references"] == "gpt-4"
    assert rows[0]["sha256"]["question.jsonl"] == file_sha256(sets / "vicuna_bench/question.jsonl")[:16]
    cli("report", *where, "--judge-model", "j", "--out", tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "common-sense" in text and "score on vicuna_bench" in text and "MT-Bench score" not in text


def test_other_judge_prompts_have_their_hash_and_files_of_their_own(tmp_path: Path) -> None:
    data, file = tmp_path / "data", lines(tmp_path / "mine.jsonl", [])
    rows = [json.loads(line) for line in (OWN_FOLDER / "judge_prompts.jsonl").read_text().splitlines()]
    lines(file, [{**row, "system_prompt": "Our own words."} for row in rows])
    own = load_questions(SetOptions("own"))
    write_answer_file(Layout(data, "salient_own"), own, "m")
    with RawServer(lambda request: completion()) as server:
        common = ("judge", "--questions", "own", "--data", data, "--judge-model", "j", "--base-url", server.url)
        cli(*common)
        cli(*common, "--judge-prompts", file)
        assert len(server.requests) == 64
        assert server.requests[-1].body["messages"][0]["content"] == "Our own words."
    digest = file_sha256(file)
    layout = Layout(data, "salient_own")
    (row, *_) = read_rows(layout.judgments("j", "single", f"own+prompts-{digest[:8]}"))
    assert row["sha256"]["judge_prompts.jsonl"] == digest[:16] and row["references"] == f"own+prompts-{digest[:8]}"
    assert len(list(read_rows(layout.judgments("j", "single", "own")))) == 32, "the others are still there"
    same = shutil.copyfile(OWN_FOLDER / "judge_prompts.jsonl", tmp_path / "same.jsonl")
    assert load_questions(SetOptions("own", judge_prompts=str(same))).reference_name == "own"
