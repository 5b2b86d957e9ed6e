"""Messages in the forms that chat templates read: content as text or as parts, arguments as objects or as JSON text.

No torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from salient_ds.data.keys import TOOL_CALLS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, Any]]
_PROBE = "salientprobe"


def as_parts(messages: Messages) -> Messages:
    """The same with every content as a list of one text part."""
    return [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]


def parts_only(source: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template prints content that is a list of parts, and nothing of content that is text."""
    message = {"role": "user", "content": _PROBE}

    def printed(one: dict[str, Any]) -> bool:
        try:
            return _PROBE in str(tokenizer.apply_chat_template([one], chat_template=source, tokenize=False))
        except Exception:  # templates refuse in many ways, and a refusal prints nothing
            return False

    return not printed(message) and printed(as_parts([message])[0])


def with_text_arguments(messages: Messages) -> Messages | None:
    """The same with the arguments of tool calls as JSON text; None if there are no arguments that are objects."""
    if not any(True for _ in _arguments(messages)):
        return None
    return [
        message | {TOOL_CALLS: [_as_text(call) for call in message[TOOL_CALLS]]} if message.get(TOOL_CALLS) else message
        for message in messages
    ]


def prints_repr(messages: Messages, text: str) -> bool:
    """Whether arguments stand in ``text`` as Python prints them, which is no JSON."""
    return any(
        str(found) in text and json.dumps(found, ensure_ascii=False) != str(found) for found in _arguments(messages)
    )


def _arguments(messages: Messages) -> Iterator[dict[str, Any]]:
    for message in messages:
        for call in message.get(TOOL_CALLS) or ():
            found = _function(call).get("arguments")
            if isinstance(found, dict):
                yield found


def _function(call: dict[str, Any]) -> dict[str, Any]:
    """What is called; OpenAI wraps it in an object, others do not."""
    inside = call.get("function")
    return inside if isinstance(inside, dict) else call


def _as_text(call: dict[str, Any]) -> dict[str, Any]:
    function = _function(call)
    if not isinstance(function.get("arguments"), dict):
        return call
    written = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return call | {"function": written} if function is not call else written
