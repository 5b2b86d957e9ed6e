"""How the two turns of every question are asked: temperatures, prompts and batches."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, Turn
from salient_ds.data.template_base import Template

from .answer_file import TurnResult, no_first_answer, with_text_status, with_thought_apart
from .questions import CATEGORIES, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "reasoning": 0.0, "math": 0.0, "coding": 0.0, "extraction": 0.0, "stem": 0.1,
    "humanities": 0.1,
}  # fmt: skip
"""MT-Bench's temperatures by category (FastChat, llm_judge/common.py: temperature_config)."""


OTHER_TEMPERATURE = 0.7
"""FastChat's temperature for a category that is none of MT-Bench's."""


def parse_temperatures(text: str, categories: Iterable[str] = CATEGORIES) -> dict[str, float]:
    """Parse temperatures by category: "mt_bench", one number for all, or "writing=0.7,math=0" to change some of them.

    Raises:
        ValueError: not a number from 0 to 10, or an unknown category.
    """
    known = list(dict.fromkeys(categories))
    default = {name: TEMPERATURES.get(name, OTHER_TEMPERATURE) for name in known}
    if text == "mt_bench":
        return default
    pairs = [part.partition("=") for part in text.split(",")]
    if len(pairs) == 1 and not pairs[0][1]:
        return dict.fromkeys(known, _degree(text))
    unknown = [name for name, _, _ in pairs if name not in known]
    if unknown:
        raise ValueError(f"--temperature names {unknown[0]!r}, which is none of {', '.join(known)}")
    return default | {name: _degree(value) for name, _, value in pairs}


def question_temperatures(text: str, questions: Sequence[Question]) -> dict[int, float]:
    """Return the temperature of each question by its id, as FastChat decides it.

    A number for all, or for the question's category, comes first; then ``required_temperature`` in the question file;
    then the category's default.
    """
    by_category = parse_temperatures(text, [question.category for question in questions])
    said = {part.partition("=")[0] for part in text.split(",")} if "=" in text else set()
    forced = text != "mt_bench" and "=" not in text
    return {
        q.question_id: by_category[q.category]
        if forced or q.category in said or q.required_temperature is None
        else q.required_temperature
        for q in questions
    }


def _degree(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 10.0:
        raise ValueError(f"--temperature {text!r}: use mt_bench, a number from 0 to 10, or category=number,...")
    return value


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue, with the temperature and the seed for sampling the answer."""

    ids: tuple[int, ...]
    temperature: float
    seed: int


class Answerer(Protocol):
    """A model that continues prompts."""

    def answer(self, prompts: Sequence[Prompt]) -> list[TurnResult]:
        """Return one answer per prompt, in order."""
        ...


@dataclass(frozen=True)
class Prompter:
    """Renders conversations with one template and tokenizer. ``stops`` are texts that end an answer."""

    template: Template
    tokenizer: PreTrainedTokenizerBase
    stops: tuple[str, ...]

    def text(self, question: Question, answers: Sequence[str]) -> str:
        """Render the prompt of turn ``len(answers) + 1``."""
        return self.template.prompt(conversation(question, answers), self.tokenizer)

    def tokens(self, question: Question, answers: Sequence[str]) -> tuple[int, ...]:
        """Tokenise the prompt as in training, with one BOS token if template and tokenizer add one."""
        text = self.text(question, answers)
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if self.template.adds_bos and self.puts_bos and not text.startswith(str(self.tokenizer.bos_token)):
            ids.insert(0, int(self.tokenizer.bos_token_id))
        return tuple(ids)

    @property
    def puts_bos(self) -> bool:
        """Whether the tokenizer adds a BOS token before a plain text."""
        begin = self.tokenizer.bos_token_id
        return begin is not None and self.tokenizer("a")["input_ids"][:1] == [begin]


def conversation(question: Question, answers: Sequence[str]) -> Conversation:
    """Return the question's turns up to the next one to answer, with the answers so far."""
    turns: list[Turn] = []
    for said, answer in zip(question.turns, answers, strict=False):
        turns += [Turn(USER, said), Turn(ASSISTANT, answer)]
    return Conversation(None, (*turns, Turn(USER, question.turns[len(answers)])))


def end_text(template: Template, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that ends an answer in the training data."""
    sample = Conversation(None, (Turn(USER, "Name a river."), Turn(ASSISTANT, "The Elbe.")))
    return template.segments(sample, tokenizer)[-1].text.partition("The Elbe.")[2].strip()


def fixed_batches(questions: Sequence[Question], lengths: Mapping[int, int], size: int) -> list[list[Question]]:
    """Divide all questions into batches of similar prompt length.

    The batches are made from the whole list, even if some questions are answered already, and each process gets whole
    batches. So the same questions are computed together in a first run, in a resumed one and on any number of
    processes, and the answers are the same to the last bit.
    """
    if size < 1:
        raise ValueError(f"--batch-size {size} must be at least 1")
    ordered = sorted(questions, key=lambda question: (lengths[question.question_id], question.question_id))
    return [ordered[begin : begin + size] for begin in range(0, len(ordered), size)]


def turn_seed(seed: int, question_id: int, turn: int, choice: int = 0) -> int:
    """Return the 63-bit random seed of one turn of one answer."""
    digest = hashlib.sha256(f"{seed}/{question_id}/{choice}/{turn}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def answer_batch(
    batch: Sequence[Question], prompter: Prompter, model: Answerer, temperatures: Mapping[int, float],
    seed_of: Callable[[int, int], int],
) -> dict[int, list[TurnResult]]:  # fmt: skip
    """Answer all turns of a batch. Turn 2 continues the model's own answer to turn 1.

    Returns:
        The results of all turns, by question.
    """
    results: dict[int, list[TurnResult]] = {question.question_id: [] for question in batch}
    for turn in range(1, max(len(question.turns) for question in batch) + 1):
        asked = list(_still_asked(batch, results, turn))
        prompts = [
            Prompt(
                prompter.tokens(question, [result.text for result in results[question.question_id]]),
                temperatures[question.question_id],
                seed_of(question.question_id, turn),
            )
            for question in asked
        ]
        for question, result in zip(asked, model.answer(prompts), strict=True):
            results[question.question_id].append(with_text_status(with_thought_apart(result)))
    return results


def _still_asked(batch: Sequence[Question], results: Mapping[int, list[TurnResult]], turn: int) -> Iterator[Question]:
    """Yield the questions to ask in this turn. A question whose turn 1 failed gets a failed result instead."""
    for question in batch:
        if turn > len(question.turns):
            continue
        before = results[question.question_id]
        missing = no_first_answer(before[-1]) if before else None
        if missing is None:
            yield question
        else:
            before.append(missing)
