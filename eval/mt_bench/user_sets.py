"""Question sets and judge prompts of the user, in FastChat's format: MT-Bench in other languages, Vicuna-80, one's own.

    data/<bench>/question.jsonl                  question_id, category, turns (one or two), required_temperature
    data/<bench>/reference_answer/<name>.jsonl   question_id, choices[0].turns
    data/judge_prompts.jsonl                     name, system_prompt, prompt_template

Their hashes are not pinned. They are printed, and stored with every answer and judgment.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from salient_ds.host import file_sha256

from .prompts import PromptSet, load_prompts
from .questions import (
    MT_BENCH_SHA256,
    OWN_FOLDER,
    REFERENCE_CATEGORIES,
    Question,
    QuestionSet,
    find_mt_bench,
    load_question_set,
)

PINNED = ("mt_bench", "own")
RESERVED = ("mt_bench", "salient_own")
"""Bench names of the pinned sets. Another set with such a name would mix its answers with theirs."""
DEFAULT_REFERENCES = "gpt-4"
NO_REFERENCES = ""
"""For commands that only ask the questions."""


@dataclass(frozen=True)
class SetOptions:
    """What the user says about the questions. ``None`` and the defaults: nothing.

    Args:
        questions: mt_bench, own, or the path of a question file or of a folder that holds one.
        path: folder of MT-Bench.
        references: name of the reference answers, or NO_REFERENCES.
        bench_name: name of the set, and of its folder below --data.
        judge_prompts: mt_bench, own, or the path of a prompt file.
        reference_categories: categories judged with a reference answer, or ("none",).
    """

    questions: str = "mt_bench"
    path: Path | None = None
    references: str = DEFAULT_REFERENCES
    bench_name: str | None = None
    judge_prompts: str | None = None
    reference_categories: tuple[str, ...] = ()


def load_questions(options: SetOptions) -> QuestionSet:
    """Load a pinned set or a set of the user, with its judge prompts.

    Raises:
        ValueError: a file is missing or wrong (the message names file and line), or options do not go together.
    """
    if options.questions in PINNED:
        if options.bench_name or options.reference_categories:
            raise ValueError("--bench-name and --reference-categories go with --questions PATH")
        found = load_question_set(options.questions, options.path, options.references or DEFAULT_REFERENCES)
    else:
        found = _user_set(options)
    return with_prompts(found, options.judge_prompts) if options.judge_prompts else found


def _user_set(options: SetOptions) -> QuestionSet:
    if options.path is not None:
        raise ValueError("--questions-path goes with --questions mt_bench; give one of the two paths")
    file, bench = locate(Path(options.questions).expanduser(), options.bench_name)
    questions = tuple(_questions(file))
    if not questions:
        raise ValueError(f"{file} holds no question")
    digest = file_sha256(file)
    if bench in RESERVED and options.bench_name:
        raise ValueError(f"--bench-name {bench} is the name of a pinned set; give another")
    if bench in RESERVED:
        bench = f"{bench}-{digest[:8]}"
    hashes = {"question.jsonl": digest}
    name, references = "none", dict[int, Sequence[str]]()
    reference_file = _reference_file(file.parent / "reference_answer", options.references)
    if reference_file is not None:
        name, references = reference_file.stem, dict(_references(reference_file))
        hashes[f"reference_answer/{reference_file.name}"] = file_sha256(reference_file)
    wanted = (options.reference_categories or REFERENCE_CATEGORIES) if options.references else ()
    marked = tuple(q.model_copy(update={"with_reference": q.category in wanted}) for q in questions)
    _check_references(marked, references, file)
    prompts, prompt_hash = _prompts_beside(file)
    return QuestionSet(
        bench=bench, origin=str(file), questions=marked, references=references, reference_name=name, prompts=prompts,
        sha256={**hashes, "judge_prompts.jsonl": prompt_hash},
    )  # fmt: skip


def locate(path: Path, bench: str | None) -> tuple[Path, str]:
    """Return (question file, bench name) for a file, a folder with question.jsonl, or FastChat's data folder."""
    if path.is_file():
        default = path.parent.name if path.name == "question.jsonl" else path.stem
        return path, _checked(bench or default)
    folders = [path / part / bench for part in (".", "data") if bench] + [path]
    for folder in folders:
        if (folder / "question.jsonl").is_file():
            return folder / "question.jsonl", _checked(bench or folder.resolve().name)
    if not path.exists():
        raise ValueError(f"--questions {path}: there is no such file or folder; or use mt_bench or own")
    there = sorted(file.parent.name for file in path.glob("*/question.jsonl"))
    raise ValueError(
        f"--questions {path} holds no question.jsonl" + (f"; give --bench-name, one of {there}" * bool(there))
    )


def _checked(bench: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", bench):
        raise ValueError(f"bench name {bench!r} must be usable as a folder name: give --bench-name")
    return bench


def _questions(file: Path) -> Iterator[Question]:
    seen: set[int] = set()
    for place, row in _rows(file):
        turns = row.get("turns")
        if not isinstance(turns, list) or not 1 <= len(turns) <= 2 or not all(_is_text(turn) for turn in turns):
            raise ValueError(f"{place}: turns must be a list of one or two texts")
        category = row.get("category", "general")
        if not _is_text(category):
            raise ValueError(f"{place}: category must be a text, not {category!r}")
        degree = row.get("required_temperature")
        if degree is not None and (isinstance(degree, bool) or not isinstance(degree, int | float)
                                   or not 0 <= degree <= 10):  # fmt: skip
            raise ValueError(f"{place}: required_temperature={degree!r} must be a number from 0 to 10")
        number = _id(row, place)
        if number in seen:
            raise ValueError(f"{place}: question_id {number} occurs twice")
        seen.add(number)
        yield Question(
            question_id=number, category=category, turns=tuple(turns),
            required_temperature=None if degree is None else float(degree),
        )  # fmt: skip


def _references(file: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    for place, row in _rows(file):
        try:
            turns = row["choices"][0]["turns"]
        except (KeyError, IndexError, TypeError):
            turns = None
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"{place}: choices[0].turns must be a list of texts")
        yield _id(row, place), tuple(turns)


def _reference_file(folder: Path, wanted: str) -> Path | None:
    if not wanted:
        return None
    there = sorted(folder.glob("*.jsonl")) if folder.is_dir() else []
    named = [file for file in there if file.stem == wanted]
    if named:
        return named[0]
    if wanted != DEFAULT_REFERENCES or len(there) > 1:
        raise ValueError(f"--references {wanted}: {folder} has {[file.stem for file in there]}")
    return there[0] if there else None


def _check_references(questions: Sequence[Question], references: Mapping[int, Sequence[str]], file: Path) -> None:
    short = [q.question_id for q in questions if q.needs_reference
             and len(references.get(q.question_id, ())) < len(q.turns)]  # fmt: skip
    if short:
        names = sorted({q.category for q in questions if q.question_id in short})
        raise ValueError(
            f"questions {short[:10]} of {file} ({', '.join(names)}) are judged with a reference answer, and "
            f"{file.parent / 'reference_answer'} has none for all of their turns: add it, or say which categories have "
            "one with --reference-categories (none: no category)"
        )


def _prompts_beside(file: Path) -> tuple[PromptSet, str]:
    """Return the prompts beside the questions, or one folder up as in FastChat, or our own."""
    places = [file.parent / "judge_prompts.jsonl", file.parent.parent / "judge_prompts.jsonl"]
    found = next((place for place in places if place.is_file()), OWN_FOLDER / "judge_prompts.jsonl")
    return load_prompts(found), file_sha256(found)


def with_prompts(found: QuestionSet, wanted: str) -> QuestionSet:
    """Return the set with other judge prompts: mt_bench, own, or a file.

    Verdicts on other prompts are another measurement. So they go to files of their own: the first digits of the
    prompts' hash become part of the references' name.
    """
    if wanted == "mt_bench":
        path = find_mt_bench(None)[1]["judge_prompts.jsonl"]
        if file_sha256(path) != MT_BENCH_SHA256["judge_prompts.jsonl"]:
            raise ValueError(f"{path} is not MT-Bench's prompt file")
    else:
        path = OWN_FOLDER / "judge_prompts.jsonl" if wanted == "own" else Path(wanted).expanduser()
    if not path.is_file():
        raise ValueError(f"--judge-prompts {wanted}: there is no such file; or use mt_bench or own")
    digest = file_sha256(path)
    name = next((key for key in found.sha256 if key.endswith("judge_prompts.jsonl")), "judge_prompts.jsonl")
    if found.sha256.get(name) == digest:
        return found
    return QuestionSet(
        bench=found.bench, origin=f"{found.origin}, judge prompts {path}", questions=found.questions,
        references=found.references, reference_name=f"{found.reference_name}+prompts-{digest[:8]}",
        prompts=load_prompts(path), sha256={**found.sha256, name: digest},
    )  # fmt: skip


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and line, object) for each line that is not blank."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {file}: {error}") from None
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines(): U+2028 may stand in a text
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}, line {number}: {str(error)[:200]}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: this is no JSON object")
        yield f"{file}, line {number}", row


def _id(row: Mapping[str, Any], place: str) -> int:
    number = row.get("question_id")
    if isinstance(number, bool) or not isinstance(number, int) or abs(number) > 2**53:
        raise ValueError(f"{place}: question_id={str(number)[:40]!r} must be a whole number")
    return number


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())
