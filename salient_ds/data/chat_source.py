"""The text of a tokenizer's chat template and its variables, the same on every day. No torch."""

from __future__ import annotations

import re
from datetime import datetime
from typing import TYPE_CHECKING, Any

from salient_ds.data.conversation import Conversation
from salient_ds.data.template_base import NAMES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A chat template that prints today's date would give another text every day, and a resumed run other data. So templates
# are given this date (the default date in Llama 3.1's template), whatever the day.
_DATE = datetime(2024, 7, 26)
_NOW = re.compile(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""")


def fixed_date_note(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """That the tokenizer's template prints today's date, and which one it prints here; None if it does not."""
    source = tokenizer.chat_template
    if isinstance(source, str) and ("strftime_now" in source or "date_string" in source):
        return f"the chat template prints today's date: it is fixed to {_DATE:%d %b %Y} for all runs"
    return None


def source_of(conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The template's text, with today's date replaced by a fixed one.

    Raises:
        ValueError: there is no template, or it asks for the date in a way that cannot be fixed.
    """
    if tokenizer is None:
        raise ValueError('template "tokenizer" is the tokenizer\'s own: it cannot be rendered without one')
    if not tokenizer.chat_template:
        raise ValueError(
            f'template "tokenizer": the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} '
            f"has no chat template; choose one of {', '.join(NAMES)}, or set its chat_template"
        )
    source = tokenizer.get_chat_template(None, conversation.tools)
    if "strftime_now" not in source:
        return source
    fixed = _NOW.sub(lambda match: repr(_DATE.strftime(match[2])), source)
    if "strftime_now(" in fixed:
        raise ValueError(
            'template "tokenizer": the chat template prints today\'s date in a form that changes while it runs '
            "(strftime_now without a literal format): every day would give other data; write a fixed date into it"
        )
    return fixed


def variables_of(conversation: Conversation) -> dict[str, Any]:
    return {"date_string": f"{_DATE:%d %b %Y}", **(conversation.template_kwargs or {})}
