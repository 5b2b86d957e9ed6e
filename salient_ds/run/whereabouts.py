"""Where a process is in its run, in words: for messages about processes that wait for each other."""

from __future__ import annotations

from collections.abc import Callable


class Whereabouts:
    """What the main thread does now. Its own thread says so, others read it."""

    def __init__(self) -> None:
        self._told: Callable[[], str] = lambda: "the start"

    def at(self, place: str | Callable[[], str]) -> None:
        """Say what begins now, such as "loading the data".

        Args:
            place: a text, or a function that any thread may call for it from now on.
        """
        text = place
        self._told = text if callable(text) else lambda: str(text)

    def __str__(self) -> str:
        return self._told()
