"""FastChat 0.2.36 with our questions, prompts and answers, and a text in the judge's place."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

for name in ("openai", "anthropic"):  # imported at the top of common.py and used only to ask a real judge
    sys.modules.setdefault(name, types.ModuleType(name))

import inputs  # noqa: E402
import pandas as pd  # noqa: E402
from fastchat.llm_judge import common, gen_judgment, show_result  # noqa: E402

HERE = Path(__file__).resolve().parent
OWN = HERE.parents[2] / "eval" / "mt_bench" / "own_questions"
PLACES = {
    "single-v1": "own-single-turn1",
    "single-math-v1": "own-single-ref-turn1",
    "single-v1-multi-turn": "own-single-turn2",
    "single-math-v1-multi-turn": "own-single-ref-turn2",
    "pair-v2": "own-pair-turn1",
    "pair-math-v1": "own-pair-ref-turn1",
    "pair-v2-multi-turn": "own-pair-turn2",
    "pair-math-v1-multi-turn": "own-pair-ref-turn2",
}
"""Our judge prompts by the names under which FastChat's make_judge functions look for theirs."""


class Template(str):
    """A prompt template that notes which placeholders FastChat fills."""

    filled: tuple[str, ...] = ()

    def format(self, *args: object, **values: object) -> str:
        self.filled = tuple(sorted(values))
        return super().format(*args, **values)


class Judge:
    """Stands where FastChat asks a model: answers with the replies it was given and keeps what it was asked."""

    def __init__(self) -> None:
        self.replies: list[str] = []
        self.requests: list[dict[str, Any]] = []
        self.now = itertools.count(1_750_000_000)

    def __call__(self, model: str, conv: Any, temperature: float, max_tokens: int) -> str:
        messages = conv.to_openai_api_messages()
        self.requests.append(
            {"model": model, "temperature": temperature, "max_tokens": max_tokens, "messages": messages}
        )
        return self.replies.pop(0)

    def play(self, match: Any, *replies: str) -> dict[str, Any]:
        """FastChat's play_a_match on one match; gives the record it would write."""
        self.replies, self.requests = list(replies), []
        function = common.play_a_match_single if isinstance(match, common.MatchSingle) else common.play_a_match_pair
        clock = types.SimpleNamespace(time=lambda: float(next(self.now)))
        with (
            mock.patch.object(common, "chat_completion_openai", self),
            mock.patch.object(common, "time", clock),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            result = function(match, output_file=None)
        assert not self.replies
        return json.loads(json.dumps(result))


class Setting:
    """Loads our questions with FastChat's loaders, makes its matches, and writes into a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.judge = folder, Judge()
        self.questions = common.load_questions(str(OWN / "question.jsonl"), None, None)
        loaded = common.load_judge_prompts(str(OWN / "judge_prompts.jsonl"))
        self.prompts = {
            theirs: loaded[ours] | {"prompt_template": Template(loaded[ours]["prompt_template"])}
            for theirs, ours in PLACES.items()
        }
        self.references = {inputs.JUDGE: common.load_model_answers(str(OWN / "reference_answer"))["own"]}
        for model in inputs.MODELS:
            rows = [inputs.answer_row(model, number) for number in inputs.QUESTIONS]
            self.lines(f"model_answer/{model}.jsonl", rows)
        self.answers = common.load_model_answers(str(folder / "model_answer"))

    def json(self, name: str, value: object) -> None:
        (self.folder / name).write_text(json.dumps(value, indent=1) + "\n")

    def lines(self, name: str, rows: Iterable[object]) -> None:
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def matches(self, mode: str, models: list[str], baseline: str | None = None) -> list[Any]:
        """The matches in the order of gen_judgment's main: turn 1, turn 1 with reference, then turn 2."""
        single = mode == "single"
        make = {"single": gen_judgment.make_match_single, "baseline": gen_judgment.make_match,
                "all": gen_judgment.make_match_all_pairs}[mode]  # fmt: skip
        judges = (gen_judgment.make_judge_single if single else gen_judgment.make_judge_pairwise)(
            inputs.JUDGE, self.prompts
        )
        common.check_data(self.questions, self.answers, self.references, models, judges)
        math = [q for q in self.questions if q["category"] in common.NEED_REF_CATS]
        plain = [q for q in self.questions if q["category"] not in common.NEED_REF_CATS]
        found: list[Any] = []
        for suffix, several in (("", False), ("-mt", True)):
            found += make(plain, models, self.answers, judges[f"default{suffix}"], baseline, multi_turn=several)
            found += make(
                math, models, self.answers, judges[f"math{suffix}"], baseline, self.references, multi_turn=several
            )
        return found

    def shown(self, display: Callable[..., None], name: str, **options: Any) -> list[list[dict[str, Any]]]:
        """The tables that a display function of show_result prints, in full precision."""
        seen: list[Any] = []
        arguments = {"input_file": str(self.folder / name), "model_list": None, "baseline_model": None} | options
        with mock.patch.object(show_result, "print", seen.append, create=True):
            display(types.SimpleNamespace(**arguments))
        return [table.reset_index().to_dict("records") for table in seen if isinstance(table, pd.DataFrame)]

    @contextlib.contextmanager
    def scratch(self, rows: list[dict[str, Any]]) -> Iterator[str]:
        """A file with these records for as long as it takes."""
        path = self.folder / "scratch.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        yield path.name
        path.unlink()
