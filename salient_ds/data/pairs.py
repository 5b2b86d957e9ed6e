"""Rows that are pairs, and rows of plain text. Standard library only.

prompt_completion  {"prompt", "completion"}: texts, or lists of messages that follow each other
chosen             {"prompt", "chosen", "rejected"}: preference pairs, of which the chosen answer is trained on
text               {"text"}: plain text, every token of which is trained on

Earlier answers, which stand in the prompt, are context: they are not trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from salient_ds.data.conversation import ASSISTANT, SYSTEM, USER, RowError, Turn
from salient_ds.data.keys import FUNCTIONS, HISTORY, SYSTEM_KEY, TEMPLATE_KWARGS, TOOLS, absent
from salient_ds.data.turns import CHAT, EMPTY_ANSWER, SHAREGPT, Names, Turns, kind_of, missing, read_turns, text_of

PROMPT, COMPLETION, CHOSEN, REJECTED, TEXT = "prompt", "completion", "chosen", "rejected", "text"
PAIR_KEYS = (PROMPT, COMPLETION)
CHOSEN_KEYS = (PROMPT, CHOSEN, REJECTED, "instruction", "input", SHAREGPT.turns)


def is_preference(row: Mapping[str, Any]) -> bool:
    """Whether the row holds a chosen and a rejected answer, and no other."""
    return not absent(row.get(CHOSEN)) and REJECTED in row and absent(row.get("output"))


def preference_refused() -> RowError:
    """The error for a preference pair that nobody asked to train on."""
    return RowError(
        "preference pair",
        f'the row is a preference pair ("{CHOSEN}" and "{REJECTED}"), and learning from the difference (DPO and the '
        f'like) is not there: set data.format to "{CHOSEN}" to train on the chosen answers alone',
    )


def from_completion(row: Mapping[str, Any]) -> Turns:
    """A prompt and what follows it. Only the completion is trained on."""
    for key in PAIR_KEYS:
        if key not in row:
            raise RowError(f'no "{key}"', missing(key, row))
    return _joined(row, row[PROMPT], row[COMPLETION], COMPLETION)


def from_chosen(row: Mapping[str, Any]) -> Turns:
    """The chosen side of a preference pair. Its last answer is trained on."""
    if CHOSEN not in row:
        raise RowError(f'no "{CHOSEN}"', missing(CHOSEN, row))
    chosen = row[CHOSEN]
    if not absent(row.get(SHAREGPT.turns)):  # LLaMA-Factory's form: the turns before, and one answer
        before: Any = row[SHAREGPT.turns]
    elif not absent(row.get("instruction")):
        question, extra = text_of(row, "instruction"), row.get("input")
        before = question if absent(extra) else f"{question}\n\n{text_of(row, 'input')}"
    else:
        before = row.get(PROMPT)
    if isinstance(chosen, list) and len(chosen) > 1:
        before = None if _begins(chosen) else before  # a whole conversation holds its prompt
        if before is None:
            return _of_lists(row, chosen[:-1], chosen[-1:], CHOSEN)
    if absent(before):
        raise RowError(f'no "{PROMPT}"', f'"{CHOSEN}" is an answer alone, and the row has no "{PROMPT}" before it')
    return _joined(row, before, chosen, CHOSEN)


def from_text(row: Mapping[str, Any]) -> Turns:
    """Plain text, as one turn. Everything that needs a template is refused."""
    for key in (SYSTEM_KEY, HISTORY, TOOLS, FUNCTIONS, TEMPLATE_KWARGS):
        if not absent(row.get(key)):
            raise RowError(key, f'"{key}" is there beside "{TEXT}": plain text is trained on as it is, without it')
    text = text_of(row, TEXT)
    if not text.strip():
        raise RowError("empty text", f'"{TEXT}" holds nothing')
    return Turns(None, (Turn(ASSISTANT, text),), ())


def _begins(items: list[Any]) -> bool:
    """Whether a list of turns begins with a question, or with the system message before one."""
    first = items[0] if isinstance(items[0], dict) else {}
    return first.get(CHAT.role) in (USER, SYSTEM) or first.get(SHAREGPT.role) in ("human", SYSTEM)


def _joined(row: Mapping[str, Any], before: Any, after: Any, name: str) -> Turns:
    """Two texts, or lists of turns; a single turn may be an object, and the one or the other a text."""
    if isinstance(before, str) and isinstance(after, str):
        if not before.strip():
            raise RowError("empty prompt", f'the prompt is empty: use format "{TEXT}" for text without a prompt')
        if not after.strip():
            raise RowError(EMPTY_ANSWER, f'empty answer: "{name}" holds no text')
        _refuse_history(row)
        turns = (Turn(USER, text_of({PROMPT: before}, PROMPT)), Turn(ASSISTANT, text_of(row, name)))
        return Turns(_system(row), turns, ())
    return _of_lists(row, before, after, name)


def _of_lists(row: Mapping[str, Any], before: Any, after: Any, name: str) -> Turns:
    _refuse_history(row)
    parts = []
    for value, key, role in ((before, PROMPT, USER), (after, name, ASSISTANT)):
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, str | list):
            raise RowError("wrong type", f'"{key}" is {kind_of(value)}, expected text or a list of turns')
        parts.append((value, role))
    names = _names(f"{PROMPT}+{name}", [item for value, _ in parts if isinstance(value, list) for item in value])
    role_name = {USER: next(k for k, v in names.roles.items() if v == USER),
                 ASSISTANT: next(k for k, v in names.roles.items() if v == ASSISTANT)}  # fmt: skip
    lists = [
        [{names.role: role_name[role], names.content: value}] if isinstance(value, str) else value
        for value, role in parts
    ]
    found = read_turns([*lists[0], *lists[1]], names)
    first = len(found.turns) - len(lists[1])
    if first < 1:
        raise RowError(f'no "{PROMPT}"', f'"{name}" has no turn before it to answer')
    if not any(turn.role == ASSISTANT and turn.train for turn in found.turns[first:]):
        raise RowError("nothing to train", f'no answer of "{name}" is trained on')
    turns = tuple(turn._replace(train=False) if k < first and turn.role == ASSISTANT else turn
                  for k, turn in enumerate(found.turns))  # fmt: skip
    column = _system(row)
    if column is not None and found.system is not None and column != found.system:
        raise RowError(SYSTEM_KEY, f'the row has a "{SYSTEM_KEY}" column and a system turn, and they differ: keep one')
    return Turns(column if column is not None else found.system, turns, found.ignored)


def _names(label: str, items: list[Any]) -> Names:
    """How the turns are written: as chat messages or as ShareGPT's."""
    shared = any(isinstance(item, dict) and SHAREGPT.role in item and CHAT.role not in item for item in items)
    return (SHAREGPT if shared else CHAT)._replace(turns=label)


def _system(row: Mapping[str, Any]) -> str | None:
    return None if absent(row.get(SYSTEM_KEY)) else text_of(row, SYSTEM_KEY)


def _refuse_history(row: Mapping[str, Any]) -> None:
    if not absent(row.get(HISTORY)):
        raise RowError(HISTORY, f'"{HISTORY}" is there beside "{PROMPT}": write earlier turns into the prompt')
