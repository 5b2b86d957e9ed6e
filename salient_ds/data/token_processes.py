"""Tokenises in several processes, with the same examples in the same order as in one.

Chunk k goes to process k modulo their number. A process gets its next chunk when its last one has been taken, so
nobody waits for a full pipe, and the order is that of the rows.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from salient_ds.data.conversation import Conversation, ProblemLog
from salient_ds.data.template_base import Template
from salient_ds.strict import Reported

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from salient_ds.data.token_report import Example, TokenizationReport

CHUNK = 1024
"""Rows that a process gets at once."""


def useful(wanted: int, rows: int) -> int:
    """How many of ``wanted`` processes get a chunk of ``rows`` rows; at least 1."""
    return max(1, min(wanted, -(-rows // CHUNK)))


class WorkerDied(RuntimeError, Reported):
    """A process that tokenises has ended before its work. The message has its exit code, and the remedy."""


class Workers:
    """Some processes that tokenise.

    Raises:
        CannotStart: template or tokenizer cannot be sent to another process.
    """

    def __init__(
        self,
        count: int,
        template: Template,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        skips: bool,
        block: int,
    ) -> None:
        try:
            setup = pickle.dumps((template, tokenizer, max_length, skips, block))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise CannotStart(str(error)) from error
        quiet = {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "salient_ds.data.token_worker"]
        path = os.pathsep.join(place for place in sys.path if place)
        self._processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | quiet | {"PYTHONPATH": path}
            )
            for _ in range(count)
        ]
        try:
            for process in self._processes:
                self._send(process, setup)
            for process in self._processes:
                self._receive(process)
        except RuntimeError as error:
            self.close()
            raise CannotStart(str(error)) from error

    def tokenized(
        self, rows: Iterable[Conversation], report: TokenizationReport, log: ProblemLog | None
    ) -> Iterator[Example]:
        """The examples of all rows, in order. ``report`` and ``log`` get what one process would write there."""
        remaining, count, taken, sent = iter(rows), len(self._processes), 0, 0
        for process in self._processes:
            sent += self._next(process, remaining)
        while taken < sent:
            process = self._processes[taken % count]
            lengths, ids, labels, part, found = self._receive(process)
            taken += 1
            sent += self._next(process, remaining)
            report.add(part)
            if log is not None:
                log.extend(found)
            ends = np.cumsum(lengths)[:-1]
            for one, other in zip(np.split(ids, ends), np.split(labels, ends), strict=True) if lengths else ():
                yield {"input_ids": one, "labels": other}

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # it has died with something unread
                    cast(IO[bytes], pipe).close()
            process.terminate()
        for process in self._processes:
            process.wait()

    def _next(self, process: subprocess.Popen[bytes], remaining: Iterator[Conversation]) -> bool:
        chunk = list(islice(remaining, CHUNK))
        if chunk:
            self._send(process, pickle.dumps(chunk, protocol=pickle.HIGHEST_PROTOCOL))
        return bool(chunk)

    def _send(self, process: subprocess.Popen[bytes], content: bytes) -> None:
        pipe = cast(IO[bytes], process.stdin)
        try:
            pipe.write(content)
            pipe.flush()
        except BrokenPipeError:
            raise self._death(process) from None

    def _receive(self, process: subprocess.Popen[bytes]) -> Any:
        try:
            found = pickle.load(cast(IO[bytes], process.stdout))
        except (EOFError, pickle.UnpicklingError):
            raise self._death(process) from None
        if isinstance(found, Exception):
            raise found
        return found

    def _death(self, process: subprocess.Popen[bytes]) -> WorkerDied:
        return WorkerDied(
            f"process {process.pid}, which tokenises rows, has ended with code {process.wait()} before its work was "
            "done (-9: killed, for its memory perhaps): set data.workers=1 to tokenise in one process"
        )


class CannotStart(RuntimeError):
    """Template or tokenizer cannot be used in another process."""
