"""Read and render every row of a file as training will, without tokenising, for ``salient-ds check``. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from salient_ds.data.conversation import OnBadRow, Problem, ProblemLog, RowError
from salient_ds.data.formats import FileSummary, Reading
from salient_ds.data.template_base import Template
from salient_ds.data.texts import texts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Rendering:
    """What a file becomes."""

    summary: FileSummary | None = None
    examples: int = 0
    """Training texts, before any is truncated or packed."""
    split: int = 0
    """Conversations that became one example per answer."""
    refused: Counter[str] = field(default_factory=Counter)
    """Rows that the template cannot render and that are left out, by kind of problem."""

    def notes(self, name: str) -> list[str]:
        """What a user should know; ``name`` is the file's part, as in "train"."""
        notes = [] if self.summary is None else self.summary.notes(name)
        if self.refused:
            kinds = ", ".join(f"{count:,} x {kind}" for kind, count in self.refused.most_common())
            notes.append(f"{name}: {sum(self.refused.values()):,} rows are left out by the template ({kinds})")
        if self.split:
            notes.append(
                f"{name}: the template rewrites the history of {self.split:,} conversations, which become one example "
                f"per answer ({self.examples:,} examples; data.rewritten_history=last_answer trains on the last alone)"
            )
        return notes


def render_file(
    path: str,
    fmt: str,
    empty_answers: OnBadRow,
    bad_rows: OnBadRow,
    template: Template,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Rendering:
    """Read and render every row.

    Raises:
        DataError: rows that cannot be read or rendered, every kind with its count.
        ValueError: the template cannot be used with this tokenizer.
    """
    reading, found = Reading(path, fmt, empty_answers, bad_rows), Rendering()
    log = ProblemLog(path, reading.container.unit)
    for conversation in reading.validated():
        try:
            texts = texts_of(conversation, template, tokenizer)
        except RowError as error:
            if bad_rows == "skip":
                found.refused[error.kind] += 1
            else:
                log.add(Problem(error.kind, conversation.source[1], str(error)))
            continue
        found.examples += len(texts)
        found.split += len(texts) > 1
    log.raise_if_any()
    found.summary = reading.summary()
    if not found.examples:
        raise ValueError(f"{path}: the template can render none of the rows ({', '.join(found.refused)})")
    return found
