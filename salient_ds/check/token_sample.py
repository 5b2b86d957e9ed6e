"""Tokenises some rows as training would, in a process of its own: lengths, what is cut off, and one example."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from salient_ds.check.helper_process import ask, reply, tokenizer_of
from salient_ds.check.model_files import inspect_model
from salient_ds.check.report import Report
from salient_ds.config.run import RunConfig

SAMPLE = 500
"""Rows that ``salient-ds check`` tokenises without ``--data``."""
PERCENTILES = (50, 90, 99, 100)
_SHOWN = 1200
"""Characters of the example."""


@dataclass(frozen=True)
class Piece:
    """A part of the example."""

    text: str
    trained: bool


def check_tokens(run: RunConfig, report: Report, rows: int | None) -> None:
    """Tokenise rows of ``data.train``, and note what training will see of them.

    The fact ``tokens`` has: rows, examples, lengths and targets (percentiles -> tokens), truncated and dropped
    (shares), mean length, example (pieces of text, each trained on or not). Nothing is done for tasks, for data that is
    not here, and without the tokenizer.

    Args:
        rows: rows to take from the start, of several sets altogether; None for all.

    Raises:
        ValueError: no row keeps an answer token within ``data.max_length``, or the tokenizer cannot be loaded.
    """
    from salient_ds.data.sources import is_local

    folder = _tokenizer_folder(run)
    if run.data.task is not None or folder is None or not all(is_local(one.path) for one in run.data.sets):
        return
    data = run.data
    question = {
        "sets": [(one.path, one.format or data.format) for one in data.sets],
        "empty_answers": data.empty_answers, "bad_rows": data.bad_rows,
        "template": data.template, "rewritten_history": data.rewritten_history, "tokenizer": str(folder),
        "trust_remote_code": run.model.trust_remote_code, "max_length": data.max_length, "rows": rows,
    }  # fmt: skip
    found = ask(__name__, question)
    report.facts["tokens"] = found
    if found["dropped"] > 0:
        report.notes.append(
            f"{found['dropped']:.1%} of {found['examples']} examples have no answer token within data.max_length="
            f"{data.max_length} and are left out: 99 % of all examples have at most {found['lengths']['99']} tokens"
        )


def _tokenizer_folder(run: RunConfig) -> Path | None:
    named = run.model.tokenizer
    folder = Path(named).expanduser() if named else inspect_model(run.model).directory
    has_one = folder is not None and any(folder.glob("tokenizer*"))
    return folder if has_one else None


def main(question: dict[str, Any]) -> None:
    """Answer one question."""
    import numpy as np

    from salient_ds.data.formats import read_data
    from salient_ds.data.templates import get_template
    from salient_ds.data.token_report import TokenizationReport
    from salient_ds.data.tokenize import count_targets, tokenize_all

    tokenizer = tokenizer_of(question)
    if tokenizer is None:
        return
    template = get_template(question["template"], question["rewritten_history"])
    limit, shortest = int(question["max_length"]), 0
    each = None if question["rows"] is None else -(-question["rows"] // len(question["sets"]))
    lengths, targets, example, dropped = [], [], None, 0
    try:
        rows = chain.from_iterable(
            islice(read_data(path, fmt, question["empty_answers"], question["bad_rows"])[0], each)
            for path, fmt in question["sets"]
        )
        whole = TokenizationReport(2**31 - 1)
        for item in tokenize_all(rows, template, tokenizer, 2**31 - 1, whole, question["bad_rows"], limit):
            lengths.append(len(item["input_ids"]))
            kept = count_targets(item["labels"][:limit])
            targets.append(kept)
            dropped += kept == 0
            if example is None and kept:
                example = _pieces(item["input_ids"][:limit].tolist(), item["labels"][:limit].tolist(), tokenizer)
            elif not kept:
                first = int(np.flatnonzero(item["labels"][1:] != -100)[0]) + 2
                shortest = min(shortest or first, first)
    except ValueError as error:
        reply({"error": str(error)})
        return
    if lengths and dropped == len(lengths):
        if question["rows"] is not None:  # a later row may keep one
            main(question | {"rows": None})
            return
        reason = (
            f"data.max_length={limit} leaves no answer token in any of the {len(lengths)} examples (the longest has "
            f"{max(lengths)} tokens): raise it to {shortest} or more, or shorten the prompts"
        )
        reply({"error": reason})
        return
    reply({
        "rows": question["rows"], "examples": len(lengths), "lengths": _percentiles(lengths),
        "targets": _percentiles(targets), "truncated": float(np.mean(np.array(lengths) > limit)),
        "dropped": dropped / max(len(lengths), 1), "mean": float(np.minimum(lengths, limit).mean()),
        "example": [vars(piece) for piece in example or []],
    })  # fmt: skip


def _percentiles(values: list[int]) -> dict[str, int]:
    import numpy as np

    return {str(p): int(np.percentile(values, p, method="higher")) for p in PERCENTILES} if values else {}


def _pieces(ids: list[int], labels: list[int], tokenizer: Any) -> list[Piece]:
    """Runs of tokens that are trained on, or not, as text. Long ones lose their middle."""
    runs: list[tuple[bool, list[int]]] = []
    for token, label in zip(ids, labels, strict=True):
        if not runs or runs[-1][0] != (label != -100):
            runs.append((label != -100, []))
        runs[-1][1].append(token)
    half = _SHOWN // (2 * len(runs))
    found, before = [], 0
    for trained, tokens in runs:
        # decoded with what comes before it: some tokenizers drop a blank at the start of a text
        start = len(tokenizer.decode(ids[:before]))
        text = tokenizer.decode(ids[: before + len(tokens)])[start:]
        before += len(tokens)
        found.append(Piece(text if len(text) <= 2 * half else f"{text[:half]} [...] {text[-half:]}", trained))
    return found


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
