"""Question answering by a span of the context, in overlapping windows (SQuAD v1.1 and v2.0). No torch."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field

from salient_ds.data.conversation import RowError
from salient_ds.data.tasks.base import Example, Features, Head, Prediction, Task, paired
from salient_ds.data.tasks.best_spans import Answering, best_answers, write_answers
from salient_ds.data.tasks.columns import identifier, parsed_json, shortened, text_of, value_of
from salient_ds.data.tasks.metrics import ANSWERS, Metric
from salient_ds.data.tasks.squad_metrics import best_thresholds, squad_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEAR = (1, -1, 2, -2)
"""By how many characters a start may be off. Of 10,565 questions of SQuAD's development set (v1.1), 15 are."""
_MOVED = "the start of an answer was off by one or two characters and was corrected"
_BATCH = 200  # examples that go to the tokenizer at once: their windows are in memory together


class Answer(NamedTuple):
    """An answer and the character of the context at which it starts."""

    text: str
    start: int


class SpanTask(Task):
    """A question, a context, and answers that stand in it.

    Answers are ``{"text": [...], "answer_start": [...]}`` or a list of ``{"text": ..., "answer_start": ...}``. The
    official JSON files of SQuAD are read as they are. Training uses the first answer, scores count the best one.
    """

    kind: Literal["question-answering"] = "question-answering"
    question_column: str = "question"
    context_column: str = "context"
    answers_column: str = "answers"
    metrics: tuple[str, ...] = ("f1", "exact_match")
    unanswerable: bool = False
    """Whether questions without an answer are allowed, as in SQuAD v2.0."""
    stride: int = Field(128, ge=0)
    """Tokens that two windows of a long context share."""
    n_best: int = Field(20, ge=1)
    """Starts and ends of each window that are tried."""
    max_answer_length: int = Field(30, ge=1)
    """Longest answer in tokens."""
    null_threshold: float = 0.0
    """Predict "no answer" if its score is larger than that of the best answer by more than this (unanswerable)."""

    head: ClassVar[Head] = "question-answering"
    outputs: ClassVar[tuple[str, ...]] = ("start_logits", "end_logits")
    windows: ClassVar[bool] = True
    fitting_metrics: ClassVar[Mapping[str, Metric]] = ANSWERS

    @property
    def num_labels(self) -> int:
        return 2

    @property
    def columns_read(self) -> tuple[str, ...]:
        return self.question_column, self.context_column, self.answers_column

    def parse(self, row: Mapping[str, Any], number: int, labelled: bool) -> Example:
        question = text_of(row, self.question_column).strip()
        context = text_of(row, self.context_column)
        answers = self._answers(row, context, labelled)
        placed = None if answers is None else tuple(_placed(answer, context) for answer in answers)
        remark = _MOVED if placed != answers else None
        return Example(identifier(row, self.id_column, number), (question, context), placed, remark)

    def _answers(self, row: Mapping[str, Any], context: str, labelled: bool) -> tuple[Answer, ...] | None:
        column = self.answers_column
        value = value_of(row, column) if labelled else row.get(column)
        if value is None and not labelled:
            return None
        answers = tuple(_listed(parsed_json(value, column), column))
        for text, start in answers:
            if not text.strip():
                raise RowError("empty answer", f"column {column!r} holds an empty answer, expected text of the context")
            if _placed(Answer(text, start), context) is None:
                found = context.find(text)
                hint = f"; it stands at {found}" if found >= 0 else ""
                there = shortened(context[start : start + len(text)]) if 0 <= start < len(context) else "nothing"
                raise RowError(
                    "answer not in its context",
                    f"answer {shortened(text)} is not at character {start} of its context, {there} is{hint}",
                )
        if not answers and not self.unanswerable:
            if labelled:
                remedy = 'add one, or set data.task.unanswerable to true ("squad/v2")'
                raise RowError("no answer", f"column {column!r} holds no answer: {remedy}")
            return None
        return answers

    def encode(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, training: bool
    ) -> Iterator[Features]:
        """Windows of ``max_length`` tokens: the whole question and a part of the context.

        A window without the (whole) answer, and every window of an unanswerable question, has its answer at the first
        special token, as in the official baselines.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"question answering needs a fast tokenizer, which knows the characters of a token; "
                f"{type(tokenizer).__name__} is not one: convert it to a tokenizer.json"
            )
        remaining = enumerate(examples)
        while batch := list(islice(remaining, _BATCH)):
            questions = [example.texts[0] for _, example in batch]
            self._check_room([example for _, example in batch], questions, tokenizer, max_length)
            encoded = tokenizer(
                questions,
                [example.texts[1] for _, example in batch],
                truncation="only_second",
                max_length=max_length,
                stride=self.stride,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            )
            samples, offsets = encoded["overflow_to_sample_mapping"], encoded["offset_mapping"]
            names = [name for name in encoded if name not in ("overflow_to_sample_mapping", "offset_mapping")]
            for window, sample in enumerate(samples):
                number, example = batch[sample]
                values: dict[str, Any] = {name: list(encoded[name][window]) for name in names}
                inside = [
                    (int(start), int(end)) if part == 1 else (0, 0)
                    for part, (start, end) in zip(encoded.sequence_ids(window), offsets[window], strict=True)
                ]
                if example.target is not None:
                    place = null_position(values["input_ids"], tokenizer)
                    first, last = answer_tokens(inside, example.target[0]) if example.target else (None, None)
                    values["start_positions"] = place if first is None else first
                    values["end_positions"] = place if last is None else last
                cut = window > 0 and samples[window - 1] == sample  # counts windows after the first
                yield Features(number, values, 1, cut, [] if training else inside)

    def _check_room(
        self, examples: Sequence[Example], questions: list[str], tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        special = tokenizer.num_special_tokens_to_add(pair=True)
        lengths = [len(ids) for ids in tokenizer(questions, add_special_tokens=False)["input_ids"]]
        for example, length in zip(examples, lengths, strict=True):
            if max_length - special - length <= self.stride:
                raise ValueError(
                    f"question {example.id} has {length} tokens, so that data.max_length={max_length} leaves "
                    f"{max(0, max_length - special - length)} for its context: that must be more than "
                    f"data.task.stride={self.stride}; raise data.max_length, lower the stride, or shorten the question"
                )

    def decode(
        self,
        examples: Sequence[Example],
        features: Sequence[Features],
        outputs: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Prediction]:
        """The best span over all windows of an example, see :mod:`.best_spans`."""
        nulls = [null_position(item.values["input_ids"], tokenizer) for item in features]
        how = Answering(self.n_best, self.max_answer_length, self.null_threshold if self.unanswerable else None)
        return best_answers(examples, features, nulls, outputs["start_logits"], outputs["end_logits"], how)

    def score(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        """Percentages by the official rules. With unanswerable questions also those of the two kinds of questions, and
        the best ones over all values of ``null_threshold``."""
        pairs = paired(predictions, examples)
        wanted = [[answer.text for answer in example.target] for _, example in pairs]
        scores = squad_scores([p.value for p, _ in pairs], wanted, self.metrics, self.unanswerable)
        odds = [p.details.get("null_odds") for p, _ in pairs]
        known = [value for value in odds if value is not None]
        if self.unanswerable and pairs and len(known) == len(odds):
            scores |= best_thresholds([p.span for p, _ in pairs], known, wanted, self.metrics)
        return scores

    def shown(self, value: Any) -> Any:
        return [answer.text for answer in value] if isinstance(value, tuple) else value

    def write_submission(self, predictions: Sequence[Prediction], folder: Path) -> list[Path]:
        """SQuAD's format: a JSON object from identifiers to texts; v2.0 also one to the odds of "no answer"."""
        return write_answers(predictions, folder, self.submission or "predictions.json", self.unanswerable)

    def length_problems(self, max_length: int, positions: int | None) -> list[str]:
        problems = super().length_problems(max_length, positions)
        if self.stride >= max_length:
            problems.append(
                f"data.task.stride={self.stride} must be below data.max_length={max_length}: windows would not advance"
            )
        return problems


def _placed(answer: Answer, context: str) -> Answer | None:
    """The answer where it stands in the context; None if that is not where it says, nor next to it."""
    text, start = answer
    for shift in (0, *_NEAR):
        if start + shift >= 0 and context.startswith(text, start + shift):
            return Answer(text, start + shift)
    return None


def null_position(input_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands for "no answer": the classification token, else the first one, else the end token."""
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None and token in input_ids:
            return list(input_ids).index(token)
    return 0


def answer_tokens(inside: Sequence[tuple[int, int]], answer: Answer) -> tuple[int, int] | tuple[None, None]:
    """First and last token of the answer in a window; (None, None) if it is not wholly in the window.

    Args:
        inside: characters of the context per token; empty ranges outside of the context.
    """
    tokens = [number for number, (start, end) in enumerate(inside) if end > start]
    begin, stop = answer.start, answer.start + len(answer.text)
    if not tokens or inside[tokens[0]][0] > begin or inside[tokens[-1]][1] < stop:
        return None, None
    first = bisect_right([inside[token][0] for token in tokens], begin) - 1
    last = bisect_left([inside[token][1] for token in tokens], stop)
    return tokens[first], tokens[last]


def _listed(value: Any, column: str) -> Iterator[Answer]:
    """Answers in either form. Raises RowError for anything else."""
    if (
        isinstance(value, Mapping)
        and isinstance(value.get("text"), list)
        and isinstance(value.get("answer_start"), list)
    ):
        texts, starts = value["text"], value["answer_start"]
        if len(texts) != len(starts):
            what = f"{len(texts)} texts, but {len(starts)} starts"
            raise RowError("answers", f"column {column!r} holds {what}: every answer needs both")
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(item, Mapping) for item in value):
        pairs = [(item.get("text"), item.get("answer_start")) for item in value]
    else:
        form = '{"text": [...], "answer_start": [...]}'
        raise RowError("answers", f"column {column!r} is {shortened(value)}, expected {form}")
    for text, start in pairs:
        if not isinstance(text, str) or isinstance(start, bool) or not isinstance(start, int) or start < 0:
            what = f"column {column!r} holds the answer {shortened(text)} at {shortened(start)}"
            raise RowError("answers", f"{what}, expected text and a character count from 0")
        yield Answer(text, start)
