"""The training texts of a row: what a template makes of a conversation, or plain text as it is. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from salient_ds.data.conversation import Conversation
from salient_ds.data.segments import Segment
from salient_ds.data.template_base import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Text(NamedTuple):
    """One training text, before it is tokenised."""

    segments: list[Segment]
    plain: bool = False
    """It is plain text: cut into blocks if it is long, instead of being cut off."""


def texts_of(
    conversation: Conversation, template: Template, tokenizer: PreTrainedTokenizerBase | None = None
) -> list[Text]:
    """The training texts of a row. Plain text needs no template: it is trained on whole, the end token after it.

    Without a tokenizer, LLaMA's end token is used.

    Raises:
        RowError: as :meth:`Template.examples`.
        ValueError: the tokenizer has no end token for plain text.
    """
    if not conversation.plain:
        return [Text(segments) for segments in template.examples(conversation, tokenizer)]
    end = "</s>" if tokenizer is None else tokenizer.eos_token
    if not end:
        raise ValueError("plain text is closed with the end token, but the tokenizer has no eos_token: set one")
    return [Text([Segment(conversation.turns[0].text + str(end), True)], plain=True)]
