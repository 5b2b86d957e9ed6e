"""What every task answers: which columns it reads, which head it needs, how outputs become predictions and a score.

A task is a small description: a mapping in a run file (``data.task``) or an entry of :mod:`.table`. Each kind of task
is a subclass of :class:`Task` in a file of its own. No torch here: ``salient-ds check`` reads tasks and rows.

From a file to a score, with the one method of a task for each arrow:

    row --parse--> Example --encode--> Features --(the model)--> outputs --decode--> Prediction --score--> numbers
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from salient_ds.data.tasks.metrics import EVERY_NAME, Metric, missing_libraries
from salient_ds.strict import Strict, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Head = Literal["sequence-classification", "regression", "seq2seq-lm", "question-answering"]
"""The values of ``model.task`` that tasks with a metric need."""


@dataclass(frozen=True, slots=True)
class Example:
    """One row after validation."""

    id: int | str
    """The row's own identifier (column ``id_column``), else its number in the file, from 0."""
    texts: tuple[str, ...]
    """What the model reads: one or two texts. Question answering: question and context."""
    target: Any = None
    """Classification: number of the label. Regression: float. Summarisation: text. Question answering: a tuple of
    answers, empty if there is none. None: the row has no label."""
    remark: str | None = None
    """What was corrected in the row; equal remarks are counted and shown to the user."""


@dataclass(slots=True)
class Features:
    """One input of the model. An example has one; in question answering it has one per window."""

    example: int
    """Number of the example in its data set."""
    values: dict[str, Any]
    """What the model is called with: lists of ints, and labels as int (class), float (regression) or list of ints."""
    targets: int
    """What it counts in a mean loss: 1, or the number of label tokens of a summary."""
    cut: bool = False
    """Whether text was cut off to fit."""
    offsets: list[tuple[int, int]] = field(default_factory=list)
    """Question answering, for evaluation: per token the characters of the context that it stands for; (0, 0) outside
    of the context."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says about one example."""

    id: int | str
    value: Any
    """Number of a label, a float or a text."""
    score: float | None = None
    """Confidence: probability of the label, or of the answer among the n best. None where the model gives none."""
    details: Mapping[str, float] = field(default_factory=dict)
    """Further numbers, such as "null_odds" of SQuAD v2.0."""
    span: str | None = None
    """Question answering with "no answer": the best span, also where ``value`` is "". None: there is none."""


class Task(Strict):
    """A description of a task. Subclasses say what is particular to a kind of task."""

    kind: str
    name: str = "own"
    """Name for logs and messages, such as "glue/mnli"."""
    metrics: tuple[str, ...]
    """Metrics to compute. The first one is the task's own: best checkpoints and tables go by it."""
    id_column: str | None = None
    """Column with an identifier of a row, which predictions carry. Default: rows are numbered from 0."""
    train: str | None = None
    """Training data to use if ``data.train`` is not set: a file or a `datasets` name."""
    eval: str | None = None
    """Labelled data to evaluate on if ``data.eval`` is not set."""
    test: str | None = None
    """Data whose labels are not published: there are predictions for it, but no score."""
    submission: str | None = None
    """Name of the file of predictions that the official server takes, such as "MNLI-m.tsv"."""

    head: ClassVar[Head]
    """What ``model.task`` has to be."""
    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    """What :meth:`decode` reads: arrays of the model's output, or "generated" (lists of token ids)."""
    windows: ClassVar[bool] = False
    """Whether an example may become several inputs of the model."""
    padding_side: ClassVar[Literal["left", "right"]] = "right"
    """Side on which batches are padded. All kinds so far read from the left: labels and offsets count from there."""
    fitting_metrics: ClassVar[Mapping[str, Metric]]
    """Metrics that this kind of task can be scored with."""

    @field_validator("metrics")
    @classmethod
    def _metrics_fit(cls, chosen: tuple[str, ...]) -> tuple[str, ...]:
        if not chosen:
            raise ValueError(f"data.task.metrics is empty: name at least one of {', '.join(cls.fitting_metrics)}")
        for name in chosen:
            if name in cls.fitting_metrics:
                continue
            fitting = f"fitting ones are {', '.join(cls.fitting_metrics)}"
            if name in EVERY_NAME:
                kind = cls.model_fields["kind"].default
                raise ValueError(f"data.task.metrics: {name!r} does not fit a task of kind {kind!r}; {fitting}")
            hint = did_you_mean(name, cls.fitting_metrics, before="; ")
            raise ValueError(f"data.task.metrics: {name!r} is not known{hint}; {fitting}")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"data.task.metrics: {', '.join(chosen)} names a metric twice: remove one")
        return chosen

    @property
    def main_metric(self) -> str:
        """The metric that best checkpoints and tables go by."""
        return self.metrics[0]

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value of the main metric is better."""
        return self.fitting_metrics[self.main_metric].lower_is_better

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of their numbers; None for tasks without classes."""
        return None

    @property
    def num_labels(self) -> int:
        """Outputs of the head per example (regression: 1; question answering: 2, for start and end)."""
        return 1

    @property
    def columns_read(self) -> tuple[str, ...]:
        """Columns that a labelled row must have."""
        raise NotImplementedError

    @abstractmethod
    def parse(self, row: Mapping[str, Any], number: int, labelled: bool) -> Example:
        """Validate one row.

        Args:
            number: of the row, from 0.
            labelled: a row without a label is an error. Otherwise a label is read if there is one.

        Raises:
            RowError: one sentence with the value and what was expected.
        """

    @abstractmethod
    def encode(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, training: bool
    ) -> Iterator[Features]:
        """Tokenise examples in order, to at most ``max_length`` tokens each.

        Args:
            training: leave out what only :meth:`decode` needs.

        Raises:
            ValueError: an example that cannot be encoded, with its identifier.
        """

    @abstractmethod
    def decode(
        self,
        examples: Sequence[Example],
        features: Sequence[Features],
        outputs: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[Prediction]:
        """One prediction per example, in order.

        Args:
            features: those that the model was called with. All features of an example stand together.
            outputs: for every name in ``outputs``, one element per element of ``features``, without padding.
        """

    @abstractmethod
    def score(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        """The task's metrics, each example counted once. Raises ValueError for examples without a label."""

    def shown(self, value: Any) -> Any:
        """A prediction or target for people to read: the name of a label instead of its number."""
        return value

    def write_submission(self, predictions: Sequence[Prediction], folder: Path) -> list[Path]:
        """Write predictions in the format of the official server into an existing folder; returns the files."""
        raise NotImplementedError

    def library_problems(self) -> list[str]:
        """One sentence per library that the task's metrics need and that is not installed."""
        return missing_libraries({name: self.fitting_metrics[name] for name in self.metrics})

    def length_problems(self, max_length: int, positions: int | None) -> list[str]:
        """What of the task does not fit ``data.max_length``, or a model with a table of ``positions``.

        That ``max_length`` itself fits the model is checked for all data (``check/tables.py``).

        Args:
            positions: None if the model has no table, or is not known.

        Returns:
            One sentence for each problem, with value, bound and remedy.
        """
        return []


def paired(predictions: Sequence[Prediction], examples: Sequence[Example]) -> list[tuple[Prediction, Example]]:
    """Predictions with their examples. Raises ValueError unless each labelled example has exactly one, in order."""
    if not examples:
        raise ValueError("there are no examples to score")
    if [prediction.id for prediction in predictions] != [example.id for example in examples]:
        raise ValueError(
            f"{len(predictions)} predictions for {len(examples)} examples, or in another order: each example needs one"
        )
    unlabelled = [example.id for example in examples if example.target is None]
    if unlabelled:
        raise ValueError(
            f"{len(unlabelled)} of {len(examples)} examples have no label (first: {unlabelled[0]}): there is no score"
        )
    return list(zip(predictions, examples, strict=True))
