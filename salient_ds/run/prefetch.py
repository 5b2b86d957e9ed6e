"""Batches made ahead by a thread: rows are read, padded and joined while the step before computes.

The thread works on host memory alone. Pinning and the copy to the device stay with the thread that trains, because a
CUDA graph that is being recorded there allows no other thread to touch the device. What a batch holds depends on its
number only, so nothing is different from making it when it is needed, and a resumed run goes on as any other.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Prefetched(Generic[Made]):
    """Makes numbered things, one ahead, in a thread of its own.

    Args:
        make: makes thing ``number``. It is called by one thread at a time.
    """

    def __init__(self, make: Callable[[int], Made]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[Made]] | None = None

    def __enter__(self) -> Prefetched[Made]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take(self, number: int) -> Made:
        """Thing ``number``. The one after it is begun.

        Raises:
            Exception: whatever ``make`` raised for this number; things that nobody takes raise nothing.
        """
        if self._ahead is not None and self._ahead[0] == number:
            wanted = self._ahead[1]
        else:  # the first one, or others were left out
            self._cancel()
            wanted = self._thread.submit(self._make, number)
        self._ahead = number + 1, self._thread.submit(self._make, number + 1)
        return wanted.result()

    def close(self) -> None:
        """End the thread, once it has finished what it has begun."""
        self._cancel()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _cancel(self) -> None:
        if self._ahead is not None:
            self._ahead[1].cancel()
        self._ahead = None
