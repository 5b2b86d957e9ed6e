"""ROUGE by `rouge-score` (the extra ``tasks``), with stemming, as the papers' scripts use it. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from salient_ds.data.tasks.metrics import SUMMARIES, require_libraries

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def sentences(text: str) -> str:
    """The text with one sentence per line, the form that rougeLsum compares line by line.

    Lines that are there stay. A sentence ends at ".", "!" or "?" before white space. The scripts of the papers ask
    nltk's model instead, which has to be downloaded; only rougeLsum can differ by it.
    """
    return "\n".join(_SENTENCE_END.sub("\n", line.strip()) for line in text.strip().splitlines() if line.strip())


def rouge_scores(predicted: Sequence[str], wanted: Sequence[str], metrics: Sequence[str]) -> dict[str, float]:
    """Mean F-measures over all examples, in percent.

    Args:
        metrics: of rouge1, rouge2, rougeL and rougeLsum.

    Raises:
        ValueError: rouge-score is not installed.
    """
    require_libraries({name: SUMMARIES[name] for name in metrics})
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(metrics), use_stemmer=True)
    totals = dict.fromkeys(metrics, 0.0)
    for text, target in zip(predicted, wanted, strict=True):
        found = scorer.score(sentences(target), sentences(text))
        for name in metrics:
            totals[name] += found[name].fmeasure
    return {name: 100 * total / len(wanted) for name, total in totals.items()}
