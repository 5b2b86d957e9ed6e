"""Converts one row (a JSON object) of a supported format to a Conversation. Standard library only.

alpaca    {"instruction", "output", optional "input", optional "system"}
messages  {"messages": [{"role": system|user|assistant, "content"}]}
sharegpt  {"conversations": [{"from": system|human|gpt, "value"}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salient_ds.data.conversation import ASSISTANT, SYSTEM, USER, Conversation, Turn
from salient_ds.strict import nearest

FORMATS = ("alpaca", "messages", "sharegpt")
EMPTY_ANSWER = "empty answer"

_CHAT_ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
_SHAREGPT_ROLES = {"system": SYSTEM, "human": USER, "gpt": ASSISTANT}
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


class RowError(ValueError):
    """An error in one row; the reader adds the line. `kind` is the short name that problems are counted by."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def detect_format(row: Mapping[str, Any]) -> str:
    """The format that a row's keys belong to: "alpaca", "messages" or "sharegpt".

    Raises RowError (a ValueError) naming the keys found and what each format needs.
    """
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "instruction" in row or "output" in row:
        return "alpaca"
    near = [hint for key in ("instruction", "messages", "conversations") if (hint := _nearest(key, row))]
    raise RowError(
        "unknown format",
        f"unknown format: {_keys(row)}; expected instruction and output (alpaca), messages "
        f"(chat) or conversations (sharegpt){'; ' + near[0] if near else ''}",
    )


def parse_row(row: object, fmt: str, source: tuple[str, int]) -> Conversation:
    """Validates one row of format `fmt` and normalises it. Raises RowError."""
    if not isinstance(row, dict):
        raise RowError("not an object", f"the row is {_kind(row)}, expected an object with keys")
    if fmt == "alpaca":
        return _from_alpaca(row, source)
    if fmt == "messages":
        return _from_turns(row, "messages", ("role", "content"), _CHAT_ROLES, source)
    assert fmt == "sharegpt", fmt
    return _from_turns(row, "conversations", ("from", "value"), _SHAREGPT_ROLES, source)


def _from_alpaca(row: dict[str, Any], source: tuple[str, int]) -> Conversation:
    instruction = _text(row, "instruction")
    answer = _text(row, "output")
    extra = "" if row.get("input") is None else _text(row, "input")
    system = None if row.get("system") is None else _text(row, "system")
    if not instruction.strip():
        raise RowError("empty instruction", 'empty "instruction"')
    if not answer.strip():
        raise RowError(EMPTY_ANSWER, 'empty answer: "output" holds no text')
    question = f"{instruction}\n\n{extra}" if extra else instruction
    turns = (Turn(USER, question), Turn(ASSISTANT, answer))
    return Conversation(system or None, turns, instruction, extra, source)


def _from_turns(
    row: dict[str, Any], key: str, names: tuple[str, str], roles: dict[str, str], source: tuple[str, int]
) -> Conversation:
    """Parse a row of turns. Chat and ShareGPT rows differ only in the names of keys and roles."""
    system: str | None = None
    turns: list[Turn] = []
    for position, item in enumerate(_items(row, key), start=1):
        label = f"{key}[{position}]"
        if not isinstance(item, dict):
            raise RowError("wrong turn", f"{label} is {_kind(item)}, expected an object with {names[0]} and {names[1]}")
        name = _text(item, names[0], label)
        text = _text(item, names[1], label)
        role = roles.get(name)
        if role is None:
            raise RowError("unknown role", _role_message(label, name, roles))
        if role == SYSTEM:
            if position > 1:
                raise RowError("role order", f"{label} is a system turn: only the first may be one")
            system = text or None
            continue
        _check_turn(label, role, name, text, turns)
        turns.append(Turn(role, text))
    if not turns or turns[-1].role != ASSISTANT:
        last = "there is none" if not turns else "the last is a user turn"
        raise RowError("role order", f"{key} must end with an assistant turn ({_name_of(ASSISTANT, roles)}): {last}")
    return Conversation(system, tuple(turns), source=source)


def _check_turn(label: str, role: str, name: str, text: str, before: list[Turn]) -> None:
    expected = USER if len(before) % 2 == 0 else ASSISTANT
    if role != expected:
        what = "begin with a user turn" if not before else "alternate between user and assistant"
        raise RowError("role order", f'{label} is a turn by "{name}": turns must {what}')
    if not text.strip():
        if role == ASSISTANT:
            raise RowError(EMPTY_ANSWER, f"empty answer: {label} holds no text")
        raise RowError("empty question", f"empty user turn: {label} holds no text")


def _role_message(label: str, name: str, roles: dict[str, str]) -> str:
    known = f'{label} has the role "{name}", known are {", ".join(roles)}'
    if name in ("tool", "function", "ipython", "observation"):
        return f"{known}: tool turns are not supported, leave these conversations out"
    near = nearest(name.lower(), roles)
    return f'{known}; did you mean "{near}"?' if near else known


def _name_of(role: str, roles: dict[str, str]) -> str:
    return next(name for name, normal in roles.items() if normal == role)


def _items(row: dict[str, Any], key: str) -> list[Any]:
    if key not in row:
        raise RowError(f'no "{key}"', _missing(key, row))
    value = row[key]
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        # Parquet written with the older list-of-struct layout holds one list per field.
        value = [dict(zip(value, cells, strict=False)) for cells in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise RowError("wrong type", f'"{key}" is {_kind(value)}, expected a list of turns')
    return value


def _text(row: dict[str, Any], key: str, inside: str = "") -> str:
    if key not in row:
        raise RowError(f'no "{key}"', (f"{inside} has " if inside else "") + _missing(key, row))
    value = row[key]
    if not isinstance(value, str):
        name = f'{inside}["{key}"]' if inside else f'"{key}"'
        raise RowError("wrong type", f"{name} is {_kind(value)}, expected text")
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


def _missing(key: str, row: Mapping[str, Any]) -> str:
    hint = _nearest(key, row)
    return f'no "{key}": {_keys(row)}{"; " + hint if hint else ""}'


def _nearest(key: str, row: Mapping[str, Any]) -> str:
    lower = {str(found).lower(): str(found) for found in row}
    near = nearest(key, lower) or next((name for name in _SYNONYMS.get(key, ()) if name in lower), None)
    return f'rename "{lower[near]}" to "{key}"?' if near else ""


def _keys(row: Mapping[str, Any]) -> str:
    shown = [str(key) for key in list(row)[:8]]
    more = f" and {len(row) - 8} more" if len(row) > 8 else ""
    return f"keys found: {', '.join(shown)}{more}" if shown else "the object is empty"


def _kind(value: object) -> str:
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
