"""The fingerprint of a template as rendered for one tokenizer.

It is stored with an adapter, and checked before the adapter is evaluated.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, Turn
from salient_ds.data.segments import Segment
from salient_ds.data.template_base import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Changing these texts invalidates every stored record.
_SYSTEM = "You answer in one line."
_TURNS = (
    Turn(USER, "What is 2 + 3?"),
    Turn(ASSISTANT, "5"),
    Turn(USER, "And 5 + 7?\nSay it in words."),
    Turn(ASSISTANT, "Twelve."),
)
_TASK = Conversation(
    None,
    (Turn(USER, "Translate to French.\n\ncheese"), Turn(ASSISTANT, "fromage")),
    "Translate to French.",
    "cheese",
)


@dataclass(frozen=True)
class TemplateRecord:
    """`sha256` covers the name, the texts and which parts are answers. `sample` is the text, for people to read."""

    name: str
    sha256: str
    sample: str

    def to_dict(self) -> dict[str, str]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TemplateRecord:
        """From JSON. Raises ValueError when a field is missing."""
        missing = [key for key in ("name", "sha256", "sample") if not isinstance(data.get(key), str)]
        if missing:
            raise ValueError(f"a template record without {', '.join(missing)}: {data}")
        return cls(data["name"], data["sha256"], data["sample"])


def template_record(template: Template, tokenizer: PreTrainedTokenizerBase | None = None) -> TemplateRecord:
    """The record of a template, from a sample: two exchanges without and with a system message, and an Alpaca task.

    A template that takes no system message gets a placeholder instead of that sample.
    """
    rendered = [
        *template.examples(Conversation(None, _TURNS), tokenizer),
        *template.examples(_TASK, tokenizer),
    ]
    try:
        rendered += template.examples(Conversation(_SYSTEM, _TURNS), tokenizer)
    except ValueError:
        rendered.append([Segment("(takes no system message)", False)])
    content = json.dumps([template.name, template.adds_bos, rendered])
    sample = "\n----\n".join("".join(segment.text for segment in segments) for segments in rendered)
    return TemplateRecord(template.name, hashlib.sha256(content.encode("utf-8")).hexdigest(), sample)


def check_record(record: TemplateRecord, template: Template, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raises ValueError when `template` does not render the sample as it did for `record`."""
    now = template_record(template, tokenizer)
    if now == record:
        return
    if now.name != record.name:
        raise ValueError(f'trained with template "{record.name}", asked for "{now.name}": use "{record.name}"')
    at = next(
        (k for k, (a, b) in enumerate(zip(record.sample, now.sample, strict=False)) if a != b),
        min(len(record.sample), len(now.sample)),
    )
    then, here = (text[max(0, at - 20) : at + 20] for text in (record.sample, now.sample))
    detail = (
        f"at character {at}: trained on {then!r}, renders {here!r}"
        if record.sample != now.sample
        else ("the texts are the same, the parts trained on are not")
    )
    raise ValueError(
        f'template "{record.name}" does not render as in training ({detail}): use the tokenizer saved with '
        "the adapter, or the version that trained it"
    )
