"""The prompts of ``salient-ds generate``: from the command line, or from a file. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, Turn

SYSTEM = "system"


class PromptError(ValueError):
    """There are no prompts, or a line is none."""


def read_prompts(prompts: Sequence[str], file: str | None, system: str | None) -> list[Conversation]:
    """All prompts, in order.

    Raises:
        PromptError: none was given, both were, or the file cannot be read; the message names the line.
    """
    if bool(prompts) == (file is not None):
        raise PromptError("give prompts, or a file of them with --file: one of the two")
    if file is None:
        return [Conversation(system, (Turn(USER, text),)) for text in prompts]
    path = Path(file).expanduser()
    if not path.is_file():
        raise PromptError(f"there is no file {file!r}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file} cannot be read: {error}") from error
    as_json = path.suffix in (".jsonl", ".json")
    found = [
        _of_json(line, f"{file}, line {k}", system) if as_json else Conversation(system, (Turn(USER, line.strip()),))
        for k, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise PromptError(f"{file} holds no prompt")
    return found


def _of_json(line: str, where: str, system: str | None) -> Conversation:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise PromptError(f"{where} is no JSON ({error}): write one text or object per line") from error
    if isinstance(row, str):
        return Conversation(system, (Turn(USER, row),))
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            return _of_messages(row["messages"], where, system)
        if isinstance(row.get("instruction"), str):
            given = row.get("input") or ""
            text = f"{row['instruction']}\n\n{given}" if given else row["instruction"]
            return Conversation(system, (Turn(USER, text),), row["instruction"], given)
        if isinstance(row.get("prompt"), str):
            return Conversation(system, (Turn(USER, row["prompt"]),))
    raise PromptError(f'{where} is neither a text nor an object with "prompt", "instruction" or "messages"')


def _of_messages(messages: list[Any], where: str, system: str | None) -> Conversation:
    turns = []
    for message in messages:
        role, text = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in (SYSTEM, USER, ASSISTANT) or not isinstance(text, str):
            raise PromptError(f"{where}: a message needs a role (system, user or assistant) and a text as content")
        if role == SYSTEM:
            system = text
        else:
            turns.append(Turn(role, text))
    if not turns or turns[-1].role != USER or any(turn.role == turns[k].role for k, turn in enumerate(turns[1:])):
        raise PromptError(f"{where}: user and assistant must take turns, and the last message must be the user's")
    return Conversation(system, tuple(turns))
