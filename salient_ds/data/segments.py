"""Cuts a rendered text into answers, which a model is trained on, and the rest. Standard library only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Segment(NamedTuple):
    """A piece of the training text; `is_answer` pieces carry labels."""

    text: str
    is_answer: bool


def cut_segments(full: str, prompts: Sequence[str], answers: Sequence[str], ends: Sequence[str]) -> list[Segment]:
    """Cuts `full` at the end of every prompt and after the end marker of every answer.

    `prompts[k]` is all of the text before `answers[k]`. `ends` are possible end markers. If two begin at the same
    place, the one listed first is taken. Raises ValueError when the text does not consist of these parts.
    """
    segments: list[Segment] = []
    cursor = 0
    limits = [len(prompt) for prompt in prompts[1:]] + [len(full)]
    for prompt, answer, limit in zip(prompts, answers, limits, strict=True):
        if not full.startswith(prompt):
            raise ValueError("the text does not begin with the prompt that generation would see")
        start = len(prompt)
        position = full.find(answer.strip(), start, limit)
        if position < 0:
            raise ValueError(f"the answer {answer[:40]!r} does not appear unchanged in the text")
        after = position + len(answer.strip())
        found = [(at, k) for k, end in enumerate(ends) if (at := full.find(end, after, limit)) >= 0]
        if not found:
            raise ValueError("no end token or stop string follows an answer: generation would never stop")
        at, which = min(found)
        stop = at + len(ends[which])
        segments += [Segment(full[cursor:start], False), Segment(full[start:stop], True)]
        cursor = stop
    return segments
