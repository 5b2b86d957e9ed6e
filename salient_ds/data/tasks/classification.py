"""Tasks that choose one of several labels for a text or a pair of texts. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from salient_ds.data.tasks.base import Example, Features, Head, Prediction, paired
from salient_ds.data.tasks.columns import label_of
from salient_ds.data.tasks.metrics import CLASSIFICATION, Metric, classification_scores
from salient_ds.data.tasks.sentences import SentenceTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ClassificationTask(SentenceTask):
    """One label per row.

    Example (in a run file)::

        data:
          task: {kind: classification, columns: [headline], labels: [serious, sarcastic], metrics: [f1, accuracy]}
    """

    kind: Literal["classification"] = "classification"
    labels: tuple[str, ...] = Field(min_length=2)
    """Names of the labels, in the order of their numbers. Rows hold a name or a number."""
    metrics: tuple[str, ...] = ("accuracy",)
    submitted_as: Literal["names", "numbers"] = "names"
    """How the official server wants labels."""

    head: ClassVar[Head] = "sequence-classification"
    fitting_metrics: ClassVar[Mapping[str, Metric]] = CLASSIFICATION

    @field_validator("labels", mode="before")
    @classmethod
    def _as_texts(cls, labels: Any) -> Any:
        """YAML reads 0, 1 and yes as other things than text."""
        if isinstance(labels, list | tuple):
            return tuple(str(label) if isinstance(label, int | float) else label for label in labels)
        return labels

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...]) -> tuple[str, ...]:
        twice = [label for label in labels if labels.count(label) > 1]
        if twice:
            raise ValueError(f"data.task.labels: {twice[0]!r} is given twice: every label needs a name of its own")
        return labels

    @model_validator(mode="after")
    def _f1_of_two(self) -> ClassificationTask:
        if "f1" in self.metrics and len(self.labels) > 2:
            raise ValueError(
                f"data.task.metrics: 'f1' is that of one of two labels, but there are {len(self.labels)}: "
                "use 'f1_macro', the mean over labels"
            )
        return self

    @property
    def label_names(self) -> tuple[str, ...]:
        return self.labels

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    def target_of(self, row: Mapping[str, Any], labelled: bool) -> int | None:
        return label_of(row, self.label_column, self.labels, labelled)

    def decode(
        self,
        examples: Sequence[Example],
        features: Sequence[Features],
        outputs: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> list[Prediction]:
        """The label with the largest logit, the first one of equals, and its probability."""
        found = []
        for example, row in zip(examples, outputs["logits"], strict=True):
            logits_C = np.asarray(row, np.float64)
            best = int(logits_C.argmax())
            probabilities_C = np.exp(logits_C - logits_C.max())
            found.append(Prediction(example.id, best, float(probabilities_C[best] / probabilities_C.sum())))
        return found

    def score(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        pairs = paired(predictions, examples)
        return classification_scores([p.value for p, _ in pairs], [e.target for _, e in pairs], self.metrics)

    def shown(self, value: Any) -> Any:
        return None if value is None else self.labels[value]

    def submitted(self, value: Any) -> str:
        return str(value) if self.submitted_as == "numbers" else self.labels[value]
