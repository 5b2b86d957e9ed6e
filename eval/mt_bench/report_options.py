"""Options of a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ReportOptions:
    """Options of a report.

    Args:
        max_failure_rate: largest fraction of verdicts without a grade for which a model's average is given.
        max_cell_failure_rate: the same for the mean of one turn or of one category, and for comparisons.
        prices: dollars per million prompt and completion tokens of the judge, to state what its replies cost.
        one_snapshot: refuse judgments that several snapshots of the judge gave.
        draws: draws of each bootstrap.
        baseline: only count comparisons against this model; it is also the zero of the ratings.
        models: models to report; empty: all.
        categories: category by question id, for rows that do not name it.
    """

    max_failure_rate: float = 0.05
    draws: int = 2000
    baseline: str | None = None
    models: tuple[str, ...] = ()
    categories: Mapping[int, str] = field(default_factory=dict)
    max_cell_failure_rate: float = 0.5
    one_snapshot: bool = False
    prices: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for name in ("max_failure_rate", "max_cell_failure_rate"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is a share between 0 and 1")
