"""Several data sets under ``data.train``, each with a weight. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from salient_ds.strict import Strict, did_you_mean, expanded

MOST = 1000.0
"""The largest weight."""
Format = Literal["auto", "alpaca", "messages", "sharegpt", "prompt_completion", "chosen", "text"]


class TrainSet(Strict):
    """One of several data sets that are trained on together."""

    path: str
    """A file, a pattern of files or a `datasets` name, as in `data.train`."""
    weight: float = Field(default=1, gt=0, le=MOST)
    """How often an epoch takes each row of this set. 1: once. 2: twice. 0.5: an epoch takes half of the rows, and the
    next epoch the other half."""
    format: Format | None = None
    """Format of the rows of this set. Default: `data.format`."""


def as_sets(items: Sequence[Any]) -> list[TrainSet]:
    """The list under ``data.train``. An element is a section, or a path alone.

    Raises:
        ValueError: with one line per problem, each with the element's number, the value and the remedy.
    """
    if not items:
        raise ValueError("data.train=[]: name at least one data set")
    sets, problems = [], []
    for number, item in enumerate(items, start=1):
        if isinstance(item, TrainSet):
            sets.append(item)
            continue
        label = f"data.train, element {number}"
        if not isinstance(item, str | dict):
            problems.append(f"{label}: {item!r} is neither a path nor a section such as {{path: a.jsonl, weight: 2}}")
            continue
        try:
            sets.append(TrainSet.model_validate({"path": item} if isinstance(item, str) else item))
        except ValidationError as error:
            problems += [f"{label}: {_said(found)}" for found in error.errors()]
    paths = [one.path for one in sets]
    twice = next((path for path in paths if paths.count(path) > 1), None)
    if twice is not None:
        problems.append(f"data.train names {twice!r} {paths.count(twice)} times: name it once, with a weight")
    if problems:
        raise ValueError("\n".join(problems))
    return sets


def by_file(one: TrainSet) -> list[TrainSet]:
    """A set for each file that matches the path, sorted by name; the set itself if nothing does or it is no pattern."""
    if not set(one.path) & set("*?"):
        return [one]
    pattern = Path(expanded(one.path))
    found = sorted(
        path for path in Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))) if path.is_file()
    )
    return [one.model_copy(update={"path": str(path)}) for path in found] or [one]


def _said(error: Any) -> str:
    """A sentence for one error of pydantic."""
    key, value = ".".join(map(str, error["loc"])), error["input"]
    if error["type"] == "missing":
        return f"the key {key!r} is missing: name the file or data set, as in {{path: a.jsonl}}"
    if error["type"] == "extra_forbidden":
        known = list(TrainSet.model_fields)
        return f"unknown key {key!r}: {did_you_mean(key, known) or 'known keys: ' + ', '.join(known)}"
    if key == "weight":
        return (
            f"weight={value!r}: give a number above 0, at most {MOST:g} (2: every row twice per epoch); a set that is "
            "not to be used is left out of the list"
        )
    return f"{key}={value!r}: {error['msg']}"
