"""Keys of rows and turns that change what a model is trained on. Each is honoured, or its row is refused by name.

A key that is not listed here, and that no format reads, has no meaning for training: it is counted in a note. Null, an
empty list and an empty text mean that a key is absent, in JSON and in Parquet columns alike. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from salient_ds.data.conversation import RowError

SYSTEM_KEY, HISTORY, TOOLS, FUNCTIONS, TEMPLATE_KWARGS = (
    "system", "history", "tools", "functions", "chat_template_kwargs",
)  # fmt: skip
MEDIA = ("images", "image", "videos", "video", "audios", "audio")
"""Columns of other media: this package trains on text, so a row that has one is refused."""
ROW_KEYS = (SYSTEM_KEY, HISTORY, TOOLS, FUNCTIONS, TEMPLATE_KWARGS, *MEDIA)
TRAIN_KEYS = ("weight", "train", "loss")
"""Keys by which data sets mark the turns that are trained on: weight is 0 or 1, the others are true or false."""
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
TOOL_CALLS = "tool_calls"
TEMPLATE_KEYS = (TOOL_CALLS, "tool_call_id", "name", *REASONING_KEYS)
"""Keys of a turn that only a chat template can print."""
TURN_KEYS = (*TRAIN_KEYS, *TEMPLATE_KEYS)


def absent(value: object) -> bool:
    """Whether a key with this value counts as not there."""
    return value is None or value == "" or (isinstance(value, list | tuple | dict) and not value)


def without_nulls(value: Any) -> Any:
    """``value`` without the null fields that Parquet adds, because all structs of a column have the same fields."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def refuse_media(row: Mapping[str, Any]) -> None:
    """Raise RowError if the row has images, videos or audio."""
    for key in MEDIA:
        if not absent(row.get(key)):
            value = row[key]
            amount = f"{len(value)} items" if isinstance(value, list | tuple) else "a value"
            raise RowError(
                key, f'"{key}" holds {amount}, but this package trains on text alone: leave such rows out of the data'
            )


def parsed(row: Mapping[str, Any], key: str, kind: type | tuple[type, ...], what: str) -> Any:
    """A value of the given kind, written as it is or as JSON text; None if the key is absent.

    Raises:
        RowError: text that is not JSON, or a value of another kind.
    """
    value = row.get(key)
    if absent(value):
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RowError(key, f'"{key}" is text that is not JSON ({error}): expected {what}') from None
        if absent(value):
            return None
    if not isinstance(value, kind):
        raise RowError(key, f'"{key}" is {type(value).__name__}, expected {what}')
    return value


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The tools that the row's conversation may call, as JSON schemas; None without any.

    ``functions`` is OpenAI's older name for them, without the wrapping object.

    Raises:
        RowError: not a list of objects, or both keys are there.
    """
    tools = parsed(row, TOOLS, list, "a list of tools")
    functions = parsed(row, FUNCTIONS, list, "a list of functions")
    if tools is not None and functions is not None:
        raise RowError(FUNCTIONS, f'"{TOOLS}" and "{FUNCTIONS}" are both there: keep one')
    if functions is not None:
        tools = [item if "function" in item else {"type": "function", "function": item} for item in _objects(functions)]
    return None if tools is None else _objects(tools)


def _objects(items: list[Any]) -> list[dict[str, Any]]:
    wrong = next((item for item in items if not isinstance(item, dict)), None)
    if wrong is not None:
        raise RowError(TOOLS, f"a tool is {type(wrong).__name__}, expected an object with name and parameters")
    return items


def is_trained(turn: Mapping[str, Any], label: str, is_answer: bool) -> bool:
    """Whether a turn carries labels: an answer does, unless the row marks it.

    Raises:
        RowError: a mark that is neither yes nor no, marks that contradict each other, or a turn of somebody else that
            is marked for training.
    """
    marks = {key: _mark(turn[key], f'{label}["{key}"]') for key in TRAIN_KEYS if not absent(turn.get(key))}
    if len(set(marks.values())) > 1:
        found = ", ".join(f"{key}={turn[key]!r}" for key in marks)
        raise RowError("marks", f"{label} is marked twice, differently: {found}")
    marked = next(iter(marks.values()), None)
    if marked and not is_answer:
        key = next(iter(marks))
        raise RowError(key, f'{label}["{key}"] asks to train on a turn that is no answer: only answers carry labels')
    return is_answer and marked is not False


def _mark(value: object, name: str) -> bool:
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    key = name.rpartition('["')[2].rstrip('"]')
    raise RowError(key, f"{name} is {value!r}: a turn is trained on (1 or true) or not (0 or false), nothing between")


def template_values(turn: Mapping[str, Any], label: str, is_answer: bool) -> dict[str, Any]:
    """What a chat template gets of a turn besides role and content.

    Raises:
        RowError: tool calls or reasoning in a turn that is no answer, or of the wrong kind.
    """
    found = {key: turn[key] for key in TEMPLATE_KEYS if not absent(turn.get(key))}
    if TOOL_CALLS in found:
        calls = _objects(parsed(found, TOOL_CALLS, list, "a list of calls"))
        found[TOOL_CALLS] = [_with_arguments(call, label) for call in calls]
    for key in (TOOL_CALLS, *REASONING_KEYS):
        if key in found and not is_answer:
            raise RowError(key, f'{label} holds "{key}", which only an answer can have')
    for key in REASONING_KEYS:
        if key in found and not isinstance(found[key], str):
            raise RowError(key, f'{label}["{key}"] is {type(found[key]).__name__}, expected text')
    return found


def _with_arguments(call: Mapping[str, Any], label: str) -> dict[str, Any]:
    """A call whose arguments are an object. OpenAI writes them as JSON text, which templates would quote once more."""
    inside = call.get("function")
    function = inside if isinstance(inside, Mapping) else call
    given = function.get("arguments")
    if not isinstance(given, str):
        return dict(call)
    try:
        arguments = json.loads(given) if given.strip() else {}
    except ValueError as error:
        raise RowError(
            TOOL_CALLS, f"{label} calls a tool with arguments that are no JSON ({error}): {given[:40]!r}"
        ) from None
    written = {**function, "arguments": arguments}
    return {**call, "function": written} if function is not call else written
