"""FastChat's numbers for our own inputs, the same for MT-Bench's files, and a set with MT-Bench's shape."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from salient_eval.mt_bench import questions
from salient_eval.mt_bench.prompts import MT_BENCH_NAMES, OWN_NAMES
from salient_eval.mt_bench.questions import QuestionSet, load_question_set
from salient_eval.mt_bench.store import load_answers

from salient_ds.host import file_sha256

OWN_FOLDER = Path(__file__).resolve().parents[2] / "golden" / "mtbench"


@dataclass(frozen=True)
class Golden:
    """A folder of FastChat's numbers and what was planted in its inputs (the README there tells of each file)."""

    folder: Path
    questions: QuestionSet
    shown: tuple[str, str]
    """The models whose answers the recorded requests show."""
    answer: Callable[[str, int], tuple[str, ...]]
    unparsed: tuple[int, int]
    """Replies about model-c without a verdict, by turn."""
    lacking: int
    """Second turns of model-b that the partial file lacks."""
    errors: tuple[float, float, float]
    """Standard errors of model-a's mean by statsmodels: naive, clustered without a correction; their precision."""
    tokens: tuple[float, float]
    """Bounds on the mean estimate of a single-grading prompt's tokens."""

    def read(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


def own_golden() -> Golden:
    """FastChat's numbers for our own inputs: tests/golden/mtbench."""

    def read(name: str) -> Any:
        return json.loads((OWN_FOLDER / name).read_text(encoding="utf-8"))

    answers = {m: load_answers(OWN_FOLDER / "model_answer" / f"{m}.jsonl") for m in ("model-a", "model-b", "model-c")}
    errors = read("stats_reference.json")["standard_errors"]["model-a"]
    counted = [case["tokens"] for case in read("judge_requests.json") if case["kind"] == "single"]
    tokens = sum(counted) / len(counted)
    return Golden(
        OWN_FOLDER, load_question_set("own"), ("model-a", "model-b"), lambda model, n: answers[model][n].turns,
        unparsed=(2, 1), lacking=12, errors=(errors["naive"], errors["clustered_uncorrected"], 1e-9),
        tokens=(0.95 * tokens, 1.05 * tokens),
    )  # fmt: skip


def shared_golden() -> Golden:
    """FastChat's numbers for MT-Bench's questions, which are not ours to copy."""
    folder = shared_folder("golden/mtbench")
    published = load_question_set("mt_bench", shared_folder("mt_bench"))

    def answer(model: str, number: int) -> tuple[str, ...]:
        return f"{model} answer to {number} turn 1 with {{braces}} and 100% [[3]]", f"{model} answer to {number} turn 2"

    # Tokens with cl100k on FastChat's own prompts with 200-token answers: 108,000 for 160 calls.
    return Golden(folder, published, ("model-x", "model-y"), answer, unparsed=(5, 2), lacking=60,
                  errors=(0.166, 0.199, 5e-4), tokens=(300, 700))  # fmt: skip


def shared_folder(name: str) -> Path:
    """A folder of other people's files in the one that SALIENT_SHARED names; the test fails when it is not there."""
    root = os.environ.get("SALIENT_SHARED")
    if not root:
        pytest.fail(f"SALIENT_SHARED is not set: a test marked outside needs it, to read {name} there", pytrace=False)
    folder = Path(root) / name
    if not folder.is_dir():
        pytest.fail(f"SALIENT_SHARED={root} holds no folder {name}, which a test marked outside reads", pytrace=False)
    return folder


def write_stand_in(folder: Path) -> Mapping[str, str]:
    """80 questions with MT-Bench's numbers, categories and files, made from our own; gives the files' hashes."""
    own = load_question_set("own")
    by_category = {c: [q for q in own.questions if q.category == c] for c in questions.CATEGORIES}
    asked, references = [], []
    for n in range(80):
        source = by_category[questions.CATEGORIES[n // 10]][n % 2]
        asked.append({"question_id": 81 + n, "category": source.category,
                      "turns": [f"Variation {n}. {turn}" for turn in source.turns]})  # fmt: skip
        if source.needs_reference:
            turns = [f"Variation {n}. {turn}" for turn in own.reference_for(source) or ()]
            references.append({"question_id": 81 + n, "choices": [{"index": 0, "turns": turns}]})
    names = {own.prompts.at(*place).name: MT_BENCH_NAMES[place] for place in OWN_NAMES}
    prompts = [json.loads(line) for line in (questions.OWN_FOLDER / "judge_prompts.jsonl").read_text().splitlines()]
    content = {
        "mt_bench/question.jsonl": asked,
        "mt_bench/reference_answer/gpt-4.jsonl": references,
        "judge_prompts.jsonl": [row | {"name": names[row["name"]]} for row in prompts],
    }
    for name, rows in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: file_sha256(folder / name) for name in content}
