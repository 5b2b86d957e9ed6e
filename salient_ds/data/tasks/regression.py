"""Tasks that give a number to a text or a pair of texts, such as a similarity from 0 to 5. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from salient_ds.data.tasks.base import Example, Features, Head, Prediction, paired
from salient_ds.data.tasks.columns import number_of
from salient_ds.data.tasks.metrics import REGRESSION, Metric, regression_scores
from salient_ds.data.tasks.sentences import SentenceTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RegressionTask(SentenceTask):
    """One number per row.

    Example (in a run file)::

        data:
          task: {kind: regression, columns: [review], label_column: stars, bounds: [1, 5], metrics: [mae, pearson]}
    """

    kind: Literal["regression"] = "regression"
    metrics: tuple[str, ...] = ("correlation", "pearson", "spearman")
    bounds: tuple[float, float] | None = None
    """Smallest and largest possible label. Predictions are cut to it in the official file, not in the metrics."""

    head: ClassVar[Head] = "regression"
    fitting_metrics: ClassVar[Mapping[str, Metric]] = REGRESSION

    @field_validator("bounds")
    @classmethod
    def _ordered(cls, bounds: tuple[float, float] | None) -> tuple[float, float] | None:
        if bounds is not None and not (math.isfinite(bounds[0]) and bounds[0] < bounds[1] < math.inf):
            raise ValueError(f"data.task.bounds=[{bounds[0]:g}, {bounds[1]:g}]: the first must be below the second")
        return bounds

    def target_of(self, row: Mapping[str, Any], labelled: bool) -> float | None:
        return number_of(row, self.label_column, labelled, self.bounds)

    def decode(
        self,
        examples: Sequence[Example],
        features: Sequence[Features],
        outputs: Mapping[str, Sequence[Any]],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> list[Prediction]:
        """The model's only output."""
        pairs = zip(examples, outputs["logits"], strict=True)
        return [Prediction(example.id, float(_only(example, row))) for example, row in pairs]

    def score(self, predictions: Sequence[Prediction], examples: Sequence[Example]) -> dict[str, float]:
        pairs = paired(predictions, examples)
        return regression_scores([p.value for p, _ in pairs], [e.target for _, e in pairs], self.metrics)

    def submitted(self, value: Any) -> str:
        low, high = self.bounds or (-math.inf, math.inf)
        return f"{min(max(value, low), high):.3f}"


def _only(example: Example, row: Any) -> Any:
    values = list(row) if hasattr(row, "__len__") else [row]
    if len(values) != 1:
        raise ValueError(f"example {example.id}: a regression head has one output, this one has {len(values)}")
    return values[0]
