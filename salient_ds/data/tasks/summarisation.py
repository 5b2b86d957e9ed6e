"""Tasks that write a short text about a long one with an encoder-decoder model. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from salient_ds.data.conversation import RowError
from salient_ds.data.tasks.base import Example, Features, Head, Prediction, Task, paired
from salient_ds.data.tasks.columns import identifier, text_of
from salient_ds.data.tasks.lengths import were_cut
from salient_ds.data.tasks.metrics import SUMMARIES, Metric
from salient_ds.data.tasks.rouge import rouge_scores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 200  # examples that go to the tokenizer at once


class SummarisationTask(Task):
    """A source text and the text to write about it. ``data.max_length`` is the length of the source.

    Example (in a run file)::

        data:
          task: {kind: summarisation, source_column: report, target_column: abstract, prefix: "summarize: "}
    """

    kind: Literal["summarisation"] = "summarisation"
    source_column: str = "document"
    target_column: str = "summary"
    prefix: str = ""
    """Text before every source; T5 was trained with "summarize: "."""
    metrics: tuple[str, ...] = ("rougeLsum", "rougeL", "rouge1", "rouge2")
    max_target_length: int = Field(128, gt=1)
    """Tokens of a target. Longer ones are cut in training; generation stops there. Scores see whole targets."""
    min_target_length: int | None = Field(None, ge=0)
    """Tokens that generation writes at least. Default of this and of the following: the model's generation config."""
    num_beams: int | None = Field(None, ge=1)
    length_penalty: float | None = None
    no_repeat_ngram_size: int | None = Field(None, ge=0)

    head: ClassVar[Head] = "seq2seq-lm"
    outputs: ClassVar[tuple[str, ...]] = ("generated",)
    fitting_metrics: ClassVar[Mapping[str, Metric]] = SUMMARIES

    @property
    def columns_read(self) -> tuple[str, ...]:
        return self.source_column, self.target_column

    @property
    def generation(self) -> dict[str, Any]:
        """Arguments for ``model.generate``."""
        chosen = {
            "max_new_tokens": self.max_target_length,
            "min_new_tokens": self.min_target_length,
            "num_beams": self.num_beams,
            "length_penalty": self.length_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
        }
        return {name: value for name, value in chosen.items() if value is not None}

    def parse(self, row: Mapping[str, Any], number: int, labelled: bool) -> Example:
        source = text_of(row, self.source_column)
        target = row.get(self.target_column)
        if labelled or target:
            target = text_of(row, self.target_column, may_be_empty=True)
            if not target.strip():
                remedy = "write one, or leave the row out"
                raise RowError("empty target", f"the target in column {self.target_column!r} is empty: {remedy}")
        return Example(identifier(row, self.id_column, number), (self.prefix + source,), target or None)

    def encode(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, training: bool
    ) -> Iterator[Features]:
        """Source and target, each cut on the right, its end token kept."""
        remaining = enumerate(examples)
        while batch := list(islice(remaining, _BATCH)):
            sources = [example.texts[0] for _, example in batch]
            encoded = tokenizer(sources, truncation=True, max_length=max_length)
            cut = were_cut(encoded["input_ids"], [sources], tokenizer, max_length)
            targets = tokenizer(
                text_target=[example.target or "" for _, example in batch],
                truncation=True,
                max_length=self.max_target_length,
            )["input_ids"]
            for place, (number, example) in enumerate(batch):
                values = {name: list(column[place]) for name, column in encoded.items()}
                if example.target is not None:
                    values["labels"] = list(targets[place])
                yield Features(number, values, len(values.get("labels", ())), cut[place])

    def decode(
        self,
        examples: Sequence[Example],
        features: Sequence[Features],
        outputs: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Prediction]:
        """The generated texts without special tokens."""
        rows = [[int(token) for token in row if int(token) >= 0] for row in outputs["generated"]]
        texts = [str(tokenizer.decode(row, skip_special_tokens=True)).strip() for row in rows]
        return [Prediction(example.id, text) for example, text in zip(examples, texts, strict=True)]

    def score(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        pairs = paired(predictions, examples)
        return rouge_scores([p.value for p, _ in pairs], [e.target for _, e in pairs], self.metrics)

    def write_submission(self, predictions: Sequence[Prediction], folder: Path) -> list[Path]:
        """One JSON object per line: id and summary. No server takes summaries, so there is no official format."""
        path = folder / (self.submission or "summaries.jsonl")
        lines = [json.dumps({"id": p.id, "summary": p.value}, ensure_ascii=False) for p in predictions]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return [path]

    def length_problems(self, max_length: int, positions: int | None) -> list[str]:
        problems = super().length_problems(max_length, positions)
        if positions is not None and self.max_target_length > positions:
            problems.append(
                f"data.task.max_target_length={self.max_target_length} is longer than the model, which has {positions} "
                "positions: lower it"
            )
        if self.min_target_length is not None and self.min_target_length > self.max_target_length:
            problems.append(
                f"data.task.min_target_length={self.min_target_length} is above "
                f"data.task.max_target_length={self.max_target_length}: lower it"
            )
        return problems
