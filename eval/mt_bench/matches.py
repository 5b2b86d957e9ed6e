"""Which answers are graded or compared, with which prompt, and how often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from .prompts import Kind, Template
from .questions import Question, QuestionSet
from .store import Answer

Mode = Literal["single", "pair-baseline", "pair-all"]
Answers = Mapping[str, Mapping[int, Answer]]


@dataclass(frozen=True)
class Options:
    """How to judge. With ``truncated``, truncated answers are judged too, as in FastChat."""

    mode: Mode = "single"
    baseline: str | None = None
    repeats: int = 1
    concurrency: int = 8
    parser: str = "strict"
    truncated: bool = False
    ask_again: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("single", "pair-baseline", "pair-all"):
            raise ValueError(f"mode {self.mode!r}: use single, pair-baseline or pair-all")
        if (self.mode == "pair-baseline") != (self.baseline is not None):
            raise ValueError(f"mode {self.mode} and baseline={self.baseline!r}: a baseline goes with pair-baseline")
        for name, value in (("repeats", self.repeats), ("concurrency", self.concurrency)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.parser not in ("strict", "fastchat"):
            raise ValueError(f"parser {self.parser!r}: use strict or fastchat")

    @property
    def kind(self) -> Kind:
        return "single" if self.mode == "single" else "pair"


@dataclass(frozen=True)
class Match:
    """One row of the judgment file: a question, a turn, one or two models, and the prompt used."""

    question: Question
    turn: int
    models: tuple[str, ...]
    template: Template
    reference: tuple[str, ...] | None
    repeat: int

    def orders(self) -> list[tuple[str, ...]]:
        """Return the games of the match: for each call, the models in the order shown to the judge."""
        return [self.models] if len(self.models) == 1 else [self.models, self.models[::-1]]


def matches(questions: QuestionSet, models: list[str], options: Options) -> list[Match]:
    """Return all matches, one repeat after the other.

    Within a repeat the order is FastChat's: turn 1 plain, turn 1 with reference, then the same for turn 2.

    Raises:
        ValueError: there is nothing to compare.
    """
    if options.mode == "single":
        sides: list[tuple[str, ...]] = [(model,) for model in models]
    elif options.mode == "pair-baseline":
        assert options.baseline is not None
        sides = [(model, options.baseline) for model in models if model != options.baseline]
    else:
        sides = list(combinations(models, 2))
    if not sides:
        raise ValueError(f"mode {options.mode} finds nothing to compare among {models}")
    found = []
    for repeat in range(options.repeats):
        for turn in (1, 2):
            for with_reference in (False, True):
                for question in questions.questions:
                    if question.needs_reference != with_reference or len(question.turns) < turn:
                        continue
                    template = questions.prompts.at(options.kind, turn, with_reference)
                    reference = questions.reference_for(question)
                    turns = tuple(reference) if reference is not None else None
                    found += [Match(question, turn, side, template, turns, repeat) for side in sides]
    return found
