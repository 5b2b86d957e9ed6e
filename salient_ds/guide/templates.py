"""The list of prompt templates, each with a rendered sample: ``salient-ds templates``. No torch, unless a tokenizer is
asked for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, Turn
from salient_ds.data.segments import Segment
from salient_ds.data.template_base import NAMES, Template
from salient_ds.data.templates import get_template, known_templates

_ABOUT = {
    "alpaca": "Stanford Alpaca's training text",
    "vicuna_v1.1": "the text of Vicuna, with its system message",
    "llama-2": "Llama 2's chat format",
    "chatml": "ChatML, as OpenAI and many models write it",
    "tokenizer": "the tokenizer's own chat template",
    "none": "prompt and answer as they are, the end token after the answer",
}
_TURNS = (
    Turn(USER, "Name a river."),
    Turn(ASSISTANT, "The Elbe."),
    Turn(USER, "And a city on it?"),
    Turn(ASSISTANT, "Dresden."),
)
_WITH_INPUT = (Turn(USER, "Translate to French.\n\ncheese"), Turn(ASSISTANT, "fromage"))
SAMPLES = {
    "alpaca": Conversation(None, _WITH_INPUT, "Translate to French.", "cheese"),
    "none": Conversation(None, (Turn(USER, "2 + 3 ="), Turn(ASSISTANT, " 5"))),
}
"""Samples that show a template better than two exchanges do."""


def tokenizer_of(place: str) -> Any:
    """The tokenizer in a folder, or of that name on the hub.

    Raises:
        ValueError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"--tokenizer {place}: no tokenizer can be loaded from there: {error}") from error


def samples(name: str | None, everything: bool, tokenizer: Any = None) -> Iterator[tuple[str, str, list[Segment]]]:
    """(name, what it is, sample cut into answers and the rest) of the template called ``name``, or of all.

    Args:
        name: None for all.
        everything: FastChat's templates too.
        tokenizer: whose tokens, and chat template, are used; None for LLaMA's tokens. Without one, the sample of the
            template "tokenizer" is empty.

    Raises:
        ValueError: there is no such template, or it cannot render the sample.
    """
    chosen = [name] if name is not None else [*NAMES, *(known_templates() if everything else ())]
    for one in chosen:
        template = get_template(one)
        about = _ABOUT.get(one, "of FastChat")
        if one == "tokenizer" and tokenizer is None:
            yield one, about, []
            continue
        yield one, about, _sample(template, one, tokenizer)


def _sample(template: Template, name: str, tokenizer: Any) -> list[Segment]:
    conversation = SAMPLES.get(name, Conversation(None, _TURNS))
    texts = template.examples(conversation, tokenizer)
    return texts[-1]  # of a template that rewrites history, the example with all turns


def print_templates(out: Console, found: Iterator[tuple[str, str, list[Segment]]]) -> None:
    """Each template with its sample; what is trained on stands in colour and between marks."""
    out.print("what is trained on stands between >> and <<; data.template chooses a template", style="dim")
    for name, about, segments in found:
        out.print()
        out.print(Text.assemble((name, "bold"), f"  {about}"))
        if not segments:
            out.print("    give --tokenizer FOLDER to see it")
            continue
        text = Text()
        for part, trained in segments:
            text.append(f">>{part}<<" if trained else part, style="green" if trained else "dim")
        for line in text.split("\n", allow_blank=True):
            line.pad_left(4)
            line.rstrip()
            out.print(line, soft_wrap=True)
