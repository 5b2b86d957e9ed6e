"""Converts one row (a JSON object) of a supported format to a Conversation. Standard library only.

alpaca    {"instruction", "output", optional "input", "system", "history"}
messages  {"messages": [{"role": system|user|assistant|tool, "content"}]}
sharegpt  {"conversations": [{"from": system|human|gpt|function_call|observation, "value"}]}
prompt_completion, chosen, text: see pairs.py

Keys that mean something for training are in keys.py: each is honoured, or the row is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, RowError, Turn
from salient_ds.data.keys import (
    HISTORY,
    ROW_KEYS,
    SYSTEM_KEY,
    TEMPLATE_KWARGS,
    absent,
    parsed,
    refuse_media,
    tools_of,
    without_nulls,
)
from salient_ds.data.pairs import (
    CHOSEN_KEYS,
    PAIR_KEYS,
    TEXT,
    from_chosen,
    from_completion,
    from_text,
    is_preference,
    preference_refused,
)
from salient_ds.data.turns import (
    CHAT,
    EMPTY_ANSWER,
    SHAREGPT,
    Names,
    Turns,
    keys_of,
    kind_of,
    missing,
    read_turns,
    rename_hint,
    text_of,
)

_OWN_KEYS = {
    "alpaca": ("instruction", "input", "output"),
    "messages": (CHAT.turns,),
    "sharegpt": (SHAREGPT.turns,),
    "prompt_completion": PAIR_KEYS,
    "chosen": CHOSEN_KEYS,
    "text": (TEXT,),
}
FORMATS = tuple(_OWN_KEYS)


class ParsedRow(NamedTuple):
    """A row that can be trained on."""

    conversation: Conversation
    ignored: tuple[str, ...]
    """Keys that nothing reads; the keys of turns as "messages[].key"."""


def detect_format(row: Mapping[str, Any]) -> str:
    """The format that a row's keys belong to, one of :data:`FORMATS`.

    Raises RowError (a ValueError) naming the keys found and what each format needs, or for a preference pair: those
    are trained on only if ``format`` says so.
    """
    if not absent(row.get("messages")):
        return "messages"
    if is_preference(row):
        raise preference_refused()
    if not absent(row.get("conversations")):
        return "sharegpt"
    if "instruction" in row or "output" in row:
        return "alpaca"
    for key, name in (("messages", "messages"), ("conversations", "sharegpt")):
        if key in row:
            return name
    if all(key in row for key in PAIR_KEYS):
        return "prompt_completion"
    if TEXT in row:
        return "text"
    near = [hint for key in ("instruction", "messages", "conversations") if (hint := rename_hint(key, row))]
    raise RowError(
        "unknown format",
        f"unknown format: {keys_of(row)}; expected instruction and output (alpaca), messages "
        f"(chat), conversations (sharegpt), prompt and completion, or text{'; ' + near[0] if near else ''}",
    )


def parse_row(row: object, fmt: str, source: tuple[str, int], nulls: bool = False, unit: str = "line") -> ParsedRow:
    """Validates one row of format `fmt` and normalises it.

    `nulls`: the row comes from Parquet or Arrow, whose structs hold null for every field that other rows have.
    `unit`: what messages call the number of the row. Raises RowError.
    """
    if not isinstance(row, dict):
        raise RowError("not an object", f"the row is {kind_of(row)}, expected an object with keys")
    if nulls:
        row = {key: without_nulls(value) for key, value in row.items()}
    refuse_media(row)
    ignored = [key for key in row if key not in (*_OWN_KEYS[fmt], *ROW_KEYS) and not absent(row[key])]
    found = _READERS[fmt](row)
    # with further turns there are no headings for the last question alone
    apart = fmt == "alpaca" and absent(row.get(HISTORY))
    conversation = Conversation(
        found.system,
        found.turns,
        instruction=text_of(row, "instruction") if apart else None,
        input=(_optional(row, "input") or "") if apart else None,
        source=source,
        tools=tools_of(row),
        template_kwargs=parsed(row, TEMPLATE_KWARGS, dict, "an object of template variables"),
        plain=fmt == "text",
        unit=unit,
    )
    return ParsedRow(conversation, (*ignored, *found.ignored))


def _from_alpaca(row: Mapping[str, Any]) -> Turns:
    instruction, answer = text_of(row, "instruction"), text_of(row, "output")
    extra = _optional(row, "input")
    if not instruction.strip():
        raise RowError("empty instruction", 'empty "instruction"')
    if not answer.strip():
        raise RowError(EMPTY_ANSWER, 'empty answer: "output" holds no text')
    question = f"{instruction}\n\n{extra}" if extra else instruction
    turns = (*_history(row), Turn(USER, question), Turn(ASSISTANT, answer))
    return Turns(_optional(row, SYSTEM_KEY), turns, ())


def _history(row: Mapping[str, Any]) -> list[Turn]:
    """Earlier exchanges: a list of [question, answer]."""
    turns: list[Turn] = []
    for position, pair in enumerate(parsed(row, HISTORY, list, "a list of [question, answer]") or [], start=1):
        label = f'"{HISTORY}"[{position}]'
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise RowError(HISTORY, f"{label} is {kind_of(pair)}, expected a pair: [question, answer]")
        question, answer = (text_of({HISTORY: text}, HISTORY, label) for text in pair)
        if not question.strip() or not answer.strip():
            raise RowError(HISTORY, f"{label} holds an empty question or answer")
        turns += [Turn(USER, question), Turn(ASSISTANT, answer)]
    return turns


def _from_turns(row: Mapping[str, Any], names: Names) -> Turns:
    """Shared by chat and ShareGPT, which differ in the names of keys and roles only."""
    if not absent(row.get(HISTORY)):
        raise RowError(HISTORY, f'"{HISTORY}" is there beside "{names.turns}": put earlier turns into {names.turns}')
    found = read_turns(_items(row, names.turns), names)
    column = _optional(row, SYSTEM_KEY)
    if column is None:
        return found
    if found.system is not None and found.system != column:
        raise RowError(SYSTEM_KEY, f'the row has a "{SYSTEM_KEY}" column and a system turn, and they differ: keep one')
    return found._replace(system=column)


_READERS: dict[str, Callable[[Mapping[str, Any]], Turns]] = {
    "alpaca": _from_alpaca,
    "messages": lambda row: _from_turns(row, CHAT),
    "sharegpt": lambda row: _from_turns(row, SHAREGPT),
    "prompt_completion": from_completion,
    "chosen": from_chosen,
    "text": from_text,
}


def _items(row: Mapping[str, Any], key: str) -> list[Any]:
    if key not in row:
        raise RowError(f'no "{key}"', missing(key, row))
    value = row[key]
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        # Parquet written with the older list-of-struct layout holds one list per field.
        value = [without_nulls(dict(zip(value, cells, strict=False))) for cells in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        raise RowError("wrong type", f'"{key}" is {kind_of(value)}, expected a list of turns')
    return value


def _optional(row: Mapping[str, Any], key: str) -> str | None:
    """Text that may be absent; None if it is."""
    return None if absent(row.get(key)) else text_of(row, key)
