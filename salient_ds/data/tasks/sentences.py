"""One or two sentences in, one output: what classification and regression share. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from salient_ds.data.tasks.base import Example, Features, Prediction, Task
from salient_ds.data.tasks.columns import identifier, text_of
from salient_ds.data.tasks.lengths import were_cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH = 1000  # examples that go to the tokenizer at once


class SentenceTask(Task):
    """A task whose input is the text of one column, or a pair of two."""

    columns: tuple[str, ...] = Field(min_length=1, max_length=2)
    """Columns of the one or two texts."""
    label_column: str = "label"
    """Column of the label."""

    @field_validator("columns")
    @classmethod
    def _two_columns(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(columns)) < len(columns):
            raise ValueError(f"data.task.columns names {columns[0]!r} twice: name two columns, or one alone")
        return columns

    @property
    def columns_read(self) -> tuple[str, ...]:
        return (*self.columns, self.label_column)

    def parse(self, row: Mapping[str, Any], number: int, labelled: bool) -> Example:
        texts = tuple(text_of(row, column) for column in self.columns)
        return Example(identifier(row, self.id_column, number), texts, self.target_of(row, labelled))

    def target_of(self, row: Mapping[str, Any], labelled: bool) -> Any:
        """The label of a row, or None. Raises RowError as :meth:`parse`."""
        raise NotImplementedError

    def encode(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, training: bool
    ) -> Iterator[Features]:
        """The tokenizer's own single or pair encoding. Of a pair, the longer text is cut first."""
        remaining = enumerate(examples)
        while batch := list(islice(remaining, _BATCH)):
            texts = [[example.texts[part] for _, example in batch] for part in range(len(self.columns))]
            encoded = tokenizer(*texts, truncation=True, max_length=max_length)
            cut = were_cut(encoded["input_ids"], texts, tokenizer, max_length)
            for place, (number, example) in enumerate(batch):
                values = {name: list(column[place]) for name, column in encoded.items()}
                if example.target is not None:
                    values["labels"] = example.target
                yield Features(number, values, 1, cut[place])

    def write_submission(self, predictions: Sequence[Prediction], folder: Path) -> list[Path]:
        """GLUE's format: a TSV file with the columns index and prediction."""
        path = folder / (self.submission or "predictions.tsv")
        lines = [f"{prediction.id}\t{self.submitted(prediction.value)}" for prediction in predictions]
        path.write_text("\n".join(["index\tprediction", *lines]) + "\n", encoding="utf-8")
        return [path]

    def submitted(self, value: Any) -> str:
        """A prediction as the server expects it."""
        return str(self.shown(value))
