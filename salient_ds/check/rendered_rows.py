"""Render all rows with the tokenizer's own chat template, in a process of its own: transformers may load torch."""

from __future__ import annotations

import json
import sys
from itertools import islice
from typing import Any

from salient_ds.check.helper_process import ask, reply, tokenizer_of
from salient_ds.config.run import RunConfig

SAMPLE = 1000
"""Rows that are tokenised, to see whether ``data.max_length`` leaves any answer."""


def rendered(run: RunConfig, path: str, fmt: str, tokenizer: str) -> tuple[int, list[str]]:
    """Number of examples that a data file becomes, and notes about it with "{name}" for the file's part.

    Args:
        fmt: format of the rows, or "auto".
        tokenizer: a folder, or a hub name whose files are in the cache.

    Raises:
        ValueError: rows that cannot be trained on, with counts by kind, or a tokenizer that cannot be loaded.
    """
    data = run.data
    question = {
        "path": path, "format": fmt, "empty_answers": data.empty_answers, "bad_rows": data.bad_rows,
        "template": data.template, "rewritten_history": data.rewritten_history, "tokenizer": tokenizer,
        "trust_remote_code": run.model.trust_remote_code, "max_length": data.max_length,
    }  # fmt: skip
    answer = ask(__name__, question)
    return int(answer["examples"]), [str(note) for note in answer["notes"]]


def main(question: dict[str, Any]) -> None:
    """Answer one question."""
    from salient_ds.data.chat_source import fixed_date_note
    from salient_ds.data.formats import read_data
    from salient_ds.data.rendering import render_file
    from salient_ds.data.templates import get_template
    from salient_ds.data.token_report import TokenizationReport
    from salient_ds.data.tokenize import tokenize_all

    tokenizer = tokenizer_of(question)
    if tokenizer is None:
        return
    template = get_template(question["template"], question["rewritten_history"])
    path, fmt, empty, bad = (question[key] for key in ("path", "format", "empty_answers", "bad_rows"))
    try:
        found = render_file(path, fmt, empty, bad, template, tokenizer)
        rows = islice(read_data(path, fmt, empty, bad)[0], SAMPLE)
        for _ in tokenize_all(rows, template, tokenizer, question["max_length"], TokenizationReport(0), bad):
            break  # an answer token is left of one of them, so that there is something to train on
    except ValueError as error:
        reply({"error": str(error)})
        return
    date = fixed_date_note(tokenizer)
    reply({"examples": found.examples, "notes": found.notes("{name}") + ([date] if date else [])})


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
