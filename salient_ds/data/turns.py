"""The turns of a chat or ShareGPT row: roles, order, content, further keys. Standard library only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from salient_ds.data.conversation import ASSISTANT, SYSTEM, TOOL, USER, RowError, Turn
from salient_ds.data.keys import TOOL_CALLS, TURN_KEYS, absent, is_trained, template_values
from salient_ds.strict import nearest

EMPTY_ANSWER = "empty answer"
CALL = "function_call"
"""ShareGPT's role for an answer that is one tool call, written as JSON text."""


class Names(NamedTuple):
    """How a format names its list of turns, its keys and its roles."""

    turns: str
    role: str
    content: str
    roles: Mapping[str, str]


CHAT = Names(
    "messages", "role", "content",
    {"system": SYSTEM, "developer": SYSTEM, "user": USER, "assistant": ASSISTANT, "tool": TOOL, "function": TOOL},
)  # fmt: skip
SHAREGPT = Names(
    "conversations", "from", "value",
    {"system": SYSTEM, "human": USER, "gpt": ASSISTANT, CALL: ASSISTANT, "observation": TOOL, "tool": TOOL},
)  # fmt: skip


class Turns(NamedTuple):
    """What a list of turns holds."""

    system: str | None
    turns: tuple[Turn, ...]
    ignored: tuple[str, ...]
    """Keys of turns that nothing reads."""


def read_turns(items: list[Any], names: Names) -> Turns:
    """Check and normalise a list of turns.

    Raises:
        RowError: a turn of the wrong kind, an unknown role, turns out of order, or nothing to train on.
    """
    system: str | None = None
    turns: list[Turn] = []
    ignored: dict[str, None] = {}
    for position, item in enumerate(items, start=1):
        label = f"{names.turns}[{position}]"
        if not isinstance(item, dict):
            wanted = f"an object with {names.role} and {names.content}"
            raise RowError("wrong turn", f"{label} is {kind_of(item)}, expected {wanted}")
        read = (names.role, names.content, *TURN_KEYS, *((CALL,) if names.content == CHAT.content else ()))
        unread = [key for key in item if key not in read and not absent(item[key])]
        ignored |= dict.fromkeys(f"{names.turns}[].{key}" for key in unread)
        name = text_of(item, names.role, label)
        role = names.roles.get(name)
        if role is None:
            raise RowError("unknown role", _role_message(label, name, names))
        if role == SYSTEM:
            if position > 1:
                raise RowError("role order", f"{label} is a system turn: only the first may be one")
            is_trained(item, label, is_answer=False)
            system = _content(item, names, label) or None
            continue
        turn = _turn(item, role, name, names, label)
        _check_order(label, turn, name, turns)
        turns.append(turn)
    _check_end(turns, names)
    return Turns(system, tuple(turns), tuple(ignored))


def _turn(item: Mapping[str, Any], role: str, name: str, names: Names, label: str) -> Turn:
    is_answer = role == ASSISTANT
    if names.content == CHAT.content and not absent(item.get(CALL)):
        item = _newer_call(item, label)
    extra = template_values(item, label, is_answer)
    if name == CALL:
        text, extra[TOOL_CALLS] = "", [_call(text_of(item, names.content, label), label)]
    elif TOOL_CALLS in extra and absent(item.get(names.content)):
        text = ""  # the calls are the answer
    else:
        text = _content(item, names, label)
    trained = is_trained(item, label, is_answer)
    return Turn(role, text, trained or not is_answer, extra or None)


def _content(item: Mapping[str, Any], names: Names, label: str) -> str:
    """The text of a turn; a list of text parts is joined, other parts are refused."""
    value = item.get(names.content)
    if not isinstance(value, list):
        return text_of(item, names.content, label)
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            shown = repr(kind) if isinstance(kind, str) else kind_of(part)
            raise RowError("content parts", f"{label} has a part of type {shown}: this package trains on text alone")
        texts.append(text_of(part, "text", f"{label}: a part"))
    return "".join(texts)


def _newer_call(item: Mapping[str, Any], label: str) -> dict[str, Any]:
    """A chat turn with OpenAI's older key for one call, "function_call", as a turn with "tool_calls"."""
    if not absent(item.get(TOOL_CALLS)):
        raise RowError(CALL, f'{label} holds "{CALL}" and "{TOOL_CALLS}": keep one')
    call = item[CALL]
    if not isinstance(call, dict):
        raise RowError(CALL, f'{label}["{CALL}"] is {kind_of(call)}, expected an object with name and arguments')
    return {key: value for key, value in item.items() if key != CALL} | {
        TOOL_CALLS: [{"type": "function", "function": call}]
    }


def _call(text: str, label: str) -> dict[str, Any]:
    try:
        call = json.loads(text)
    except ValueError as error:
        raise RowError(CALL, f"{label} is a {CALL} that is not JSON: {error}") from None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise RowError(CALL, f"{label} is a {CALL} without a name: expected an object with name and arguments")
    return {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}


def _check_order(label: str, turn: Turn, name: str, before: list[Turn]) -> None:
    """User and assistant alternate; the results of tool calls come between two turns of the assistant."""
    last = before[-1] if before else None
    called = last is not None and (last.role == TOOL or bool(last.extra and TOOL_CALLS in last.extra))
    if last is None:
        allowed: tuple[str, ...] = (USER,)
    elif last.role == USER:
        allowed = (ASSISTANT,)
    elif last.role == TOOL:
        allowed = (TOOL, ASSISTANT)
    else:
        allowed = (USER, TOOL) if called else (USER,)
    if turn.role not in allowed:
        if turn.role == TOOL:
            what = "a tool's result must follow an answer with tool_calls"
        elif last is None:
            what = "turns must begin with a user turn"
        else:
            what = "turns must alternate between user and assistant"
        raise RowError("role order", f'{label} is a turn by "{name}": {what}')
    if not turn.text.strip():
        if turn.role == ASSISTANT and not (turn.extra and TOOL_CALLS in turn.extra):
            raise RowError(EMPTY_ANSWER, f"empty answer: {label} holds no text")
        if turn.role == USER:
            raise RowError("empty question", f"empty user turn: {label} holds no text")


def _check_end(turns: list[Turn], names: Names) -> None:
    if not turns or turns[-1].role != ASSISTANT:
        last = "there is none" if not turns else f"the last is a {turns[-1].role} turn"
        own = next(name for name, role in names.roles.items() if role == ASSISTANT)
        raise RowError("role order", f"{names.turns} must end with an assistant turn ({own}): {last}")
    if not any(turn.train for turn in turns if turn.role == ASSISTANT):
        raise RowError("nothing to train", f"no answer of {names.turns} is trained on: all are marked 0 or false")


def _role_message(label: str, name: str, names: Names) -> str:
    known = f'{label} has the role "{name}", known are {", ".join(names.roles)}'
    near = nearest(name.lower(), names.roles)
    return f'{known}; did you mean "{near}"?' if near else known


def text_of(row: Mapping[str, Any], key: str, inside: str = "") -> str:
    """The text under ``key``, which every tokenizer accepts.

    Raises:
        RowError: the key is not there, its value is no text, or holds half of a surrogate pair.
    """
    if key not in row:
        raise RowError(f'no "{key}"', (f"{inside} has " if inside else "") + missing(key, row))
    value = row[key]
    if not isinstance(value, str):
        name = f'{inside}["{key}"]' if inside else f'"{key}"'
        raise RowError("wrong type", f"{name} is {kind_of(value)}, expected text")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowError(
                "broken text",
                f'"{key}" holds half of a surrogate pair ({value[error.start]!a}) at character '
                f"{error.start + 1}: no tokenizer accepts it",
            ) from None
    return value


# Names that other tools give to the same field: close in meaning, not in spelling.
_SYNONYMS = {
    "output": ("response", "answer", "completion", "target"),
    "instruction": ("prompt", "question", "query"),
    "messages": ("conversation", "dialog", "chat"),
    "content": ("value", "text"),
    "value": ("content", "text"),
    "role": ("from",),
    "from": ("role",),
}


def missing(key: str, row: Mapping[str, Any]) -> str:
    """That ``key`` is not there, which keys are, and which of them may be meant."""
    hint = rename_hint(key, row)
    return f'no "{key}": {keys_of(row)}{"; " + hint if hint else ""}'


def rename_hint(key: str, row: Mapping[str, Any]) -> str:
    """A question such as 'rename "answer" to "output"?', or nothing."""
    lower = {str(found).lower(): str(found) for found in row}
    near = nearest(key, lower) or next((name for name in _SYNONYMS.get(key, ()) if name in lower), None)
    return f'rename "{lower[near]}" to "{key}"?' if near else ""


def keys_of(row: Mapping[str, Any]) -> str:
    """The first keys of a row, for messages."""
    shown = [str(key) for key in list(row)[:8]]
    more = f" and {len(row) - 8} more" if len(row) > 8 else ""
    return f"keys found: {', '.join(shown)}{more}" if shown else "the object is empty"


def kind_of(value: object) -> str:
    """A value's kind in words: null, text, a list, an object, true/false, a number."""
    if value is None:
        return "null"
    names = {
        "str": "text",
        "list": "a list",
        "dict": "an object",
        "bool": "true/false",
        "int": "a number",
        "float": "a number",
    }
    return names.get(type(value).__name__, type(value).__name__)
