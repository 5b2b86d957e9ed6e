"""A process that tokenises chunks of rows: ``python -m salient_ds.data.token_worker``. No torch of our own.

It reads pickled objects from its standard input and answers each on its standard output: first (template, tokenizer,
max_length, skips bad rows, block), then lists of conversations. It ends when its input ends, so it never outlives the
process that started it. Both ends are ours and on one machine; nothing from elsewhere is unpickled.
"""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any, BinaryIO

import numpy as np


def flat(parts: list[Any]) -> Any:
    """Rows of one column as one array."""
    return np.concatenate(parts) if parts else np.zeros(0, np.int32)


def serve(asked: BinaryIO, answers: BinaryIO) -> None:
    """Answer until there are no more questions. What goes wrong is an answer, too: the exception itself."""
    from salient_ds.data.conversation import ProblemLog
    from salient_ds.data.token_report import TokenizationReport
    from salient_ds.data.tokenize import tokenize_rows

    def answer(value: Any) -> None:
        pickle.dump(value, answers, protocol=pickle.HIGHEST_PROTOCOL)
        answers.flush()

    try:
        template, tokenizer, max_length, skips, block = pickle.load(asked)
    except Exception as error:  # such as a class of a tokenizer that cannot be imported here
        answer(RuntimeError(f"{type(error).__name__}: {error}"))
        return
    answer(os.getpid())
    while True:
        try:
            rows = pickle.load(asked)
        except EOFError:
            return
        report, log = TokenizationReport(max_length), ProblemLog("")
        try:
            found = list(tokenize_rows(rows, template, tokenizer, max_length, report, None if skips else log, block))
        except Exception as error:
            answer(error)
            continue
        lengths = [len(example["labels"]) for example in found]
        ids, labels = (flat([example[name] for example in found]) for name in ("input_ids", "labels"))
        answer((lengths, ids, labels, report, log))


if __name__ == "__main__":
    own = os.fdopen(os.dup(1), "wb")  # libraries may print: that goes to standard error
    os.dup2(2, 1)
    serve(sys.stdin.buffer, own)
