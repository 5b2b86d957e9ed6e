"""Prompt templates: they turn a conversation into text segments, each an answer (trained on) or not. No torch.

Four templates have a short name. All others of fastchat are "fastchat:NAME":
alpaca       Stanford Alpaca's training text (tatsu-lab/stanford_alpaca, train.py), with and without an input
vicuna_v1.1  fastchat's own, which Vicuna was trained with
llama-2      fastchat's own: `[INST] question [/INST] answer </s><s>[INST] ...`, as Llama 2 was trained
tokenizer    the tokenizer's chat template

An answer's segment starts where the prompt for generation ends. So its leading blank (as in "ASSISTANT: yes") is
trained on. The segment ends with the end token; what follows up to the next prompt is not trained on. The text of a
training example ends with its last end token: for every template, the text is prompt + answer + end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from fastchat import conversation as fastchat

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, Turn
from salient_ds.data.segments import Segment, cut_segments
from salient_ds.strict import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA_REGISTERED = "salient_alpaca"
NAMES = ("alpaca", "vicuna_v1.1", "llama-2", "tokenizer")
_PREFIX = "fastchat:"
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
# A chat template that prints today's date would give a different text every day. Templates that accept a date are given
# this one (the default date in Llama 3.1's template).
_CHAT_DATE = "26 Jul 2024"
_SENTENCES = (
    Turn(USER, "Name a river."),
    Turn(ASSISTANT, "The Elbe."),
    Turn(USER, "And a city on it?"),
    Turn(ASSISTANT, "Dresden."),
)


class Template(ABC):
    """Renders conversations.

    `adds_bos`: whether the tokenizer's beginning-of-sequence token goes before the text. It is False for a tokenizer's
    own chat template, which contains all its special tokens.
    """

    name: str
    adds_bos: bool = True

    @abstractmethod
    def _render(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> str:
        """The text up to and including the last turn. After a user turn, also the words that open an answer."""

    @abstractmethod
    def _ends(self, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
        """Texts that may close an answer."""

    def segments(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Segment]:
        """The training text, cut into answers (trained on) and the rest. The last segment is an answer.

        Without a tokenizer, LLaMA's special tokens are used. Raises ValueError, with the file and line of the
        conversation, when the rendered text lacks the system message or cannot be cut into its prompts and answers.
        """
        assert conversation.turns and conversation.turns[-1].role == ASSISTANT, "training text ends with an answer"
        prompts = [
            self.prompt(_head(conversation, k), tokenizer)
            for k, turn in enumerate(conversation.turns)
            if turn.role == ASSISTANT
        ]
        try:
            return cut_segments(
                self._render(conversation, tokenizer), prompts, conversation.answers, self._ends(tokenizer)
            )
        except ValueError as error:
            raise ValueError(f'template "{self.name}" on {conversation.where}: {error}') from None

    def prompt(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """The text that a model continues with an answer; `conversation` ends with a user turn.

        Raises ValueError when the template would drop the system message.
        """
        assert conversation.turns and conversation.turns[-1].role == USER, "a prompt ends with a user turn"
        text = self._render(conversation, tokenizer)
        if conversation.system and conversation.system.strip() not in text:
            raise ValueError(
                f'template "{self.name}" has no place for the system message of {conversation.where}: choose '
                "another template, or leave system messages out of the data"
            )
        return text

    def text(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """The whole training text."""
        return "".join(segment.text for segment in self.segments(conversation, tokenizer))


class FastchatTemplate(Template):
    """A template of fastchat's registry. The tokenizer's end and beginning tokens replace its "</s>" and "<s>"."""

    def __init__(self, name: str, registered: str) -> None:
        self.name = name
        self.registered = registered

    def _render(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> str:
        chat = self._empty(tokenizer)
        if conversation.system is not None:
            chat.set_system_message(conversation.system)
        for turn in conversation.turns:
            chat.append_message(chat.roles[turn.role == ASSISTANT], turn.text)
        if conversation.turns[-1].role == USER:
            chat.append_message(chat.roles[1], None)
        return str(chat.get_prompt())

    def _empty(self, tokenizer: PreTrainedTokenizerBase | None) -> fastchat.Conversation:
        chat = fastchat.get_conv_template(self.registered)
        if tokenizer is not None:
            begin, end = tokenizer.bos_token or "", _end_token(tokenizer, self.name)
            chat.sep = chat.sep and chat.sep.replace("</s>", end).replace("<s>", begin)
            chat.sep2 = chat.sep2 and chat.sep2.replace("</s>", end).replace("<s>", begin)
        return chat

    def _ends(self, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
        chat = self._empty(tokenizer)
        stops = [chat.stop_str] if isinstance(chat.stop_str, str) else list(chat.stop_str or ())
        end = "</s>" if tokenizer is None else _end_token(tokenizer, self.name)
        return [text.strip() for text in [end, *stops, chat.sep2, chat.sep] if text and text.strip()]


class AlpacaTemplate(FastchatTemplate):
    """Stanford Alpaca's training text, as a fastchat template registered under its own name.

    fastchat's "alpaca" is a different text: "### Instruction: Q" on one line, "### Response: A" with a blank, and never
    an input. Further turns, which Alpaca never had, repeat the two headings after an empty line. A conversation's
    system message replaces the opening sentence.
    """

    def __init__(self) -> None:
        super().__init__("alpaca", ALPACA_REGISTERED)
        fastchat.register_conv_template(
            fastchat.Conversation(
                name=ALPACA_REGISTERED,
                system_template="{system_message}\n\n",
                system_message=_ALPACA,
                roles=("### Instruction:\n", "### Response:"),
                sep_style=fastchat.SeparatorStyle.NO_COLON_TWO,
                sep="\n\n",
                sep2="</s>\n\n",
                stop_str="</s>",
            ),
            override=True,
        )

    def _render(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> str:
        if conversation.input:
            question = f"{conversation.instruction}\n\n### Input:\n{conversation.input}"
            turns = (Turn(USER, question), *conversation.turns[1:])
            conversation = Conversation(conversation.system or _ALPACA_WITH_INPUT, turns)
        return super()._render(conversation, tokenizer)


class Llama2Template(FastchatTemplate):
    """Llama 2's chat format. Texts are stripped, as in the released `chat_completion` (llama/generation.py)."""

    def _render(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> str:
        # With a system message, "<<SYS>>...<</SYS>>\n\n" + question is stripped as one text, so the question itself is
        # not stripped on the left.
        turns = tuple(
            Turn(turn.role, turn.text.rstrip() if k == 0 and conversation.system else turn.text.strip())
            for k, turn in enumerate(conversation.turns)
        )
        return super()._render(Conversation(conversation.system, turns), tokenizer)


class TokenizerTemplate(Template):
    """The tokenizer's own chat template, by `apply_chat_template`."""

    name = "tokenizer"
    adds_bos = False

    def __init__(self) -> None:
        self._known_ends: tuple[object, int, list[str]] = (None, 0, [])

    def _render(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> str:
        if tokenizer is None:
            raise ValueError('template "tokenizer" is the tokenizer\'s own: it cannot be rendered without one')
        if not tokenizer.chat_template:
            raise ValueError(
                f'template "tokenizer": the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} '
                f"has no chat template; choose one of {', '.join(NAMES)}, or set its chat_template"
            )
        import jinja2

        asks = conversation.turns[-1].role == USER
        try:
            return str(
                tokenizer.apply_chat_template(
                    conversation.messages(),
                    tokenize=False,
                    add_generation_prompt=asks,
                    date_string=_CHAT_DATE,
                )
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template of the tokenizer refuses {conversation.where}: {error}") from None

    def _ends(self, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
        assert tokenizer is not None, "rendering has refused this already"
        owner, size, ends = self._known_ends
        if owner is not tokenizer or size != len(tokenizer):  # making the list takes longer than rendering
            special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
            special |= set(tokenizer.all_special_tokens)
            no_end = {tokenizer.bos_token, tokenizer.unk_token} - {tokenizer.eos_token}
            ends = sorted(special - no_end, key=lambda text: (-len(text), text))
            self._known_ends = (tokenizer, len(tokenizer), ends)
        return ends


def get_template(name: str) -> Template:
    """The template called `name`: alpaca, vicuna_v1.1, llama-2, tokenizer, or fastchat:NAME.

    A fastchat template is accepted if a sample of two exchanges can be cut into prompts, answers and end markers.
    Raises ValueError for an unknown name (with the nearest known one), and for a template that cannot be cut (with the
    reason).
    """
    if name == "alpaca":
        return AlpacaTemplate()
    if name == "tokenizer":
        return TokenizerTemplate()
    registered = name.removeprefix(_PREFIX)
    if registered not in fastchat.conv_templates or (registered == name and name not in NAMES):
        raise ValueError(
            f'unknown template "{name}"{_suggestion(registered)}; known are {", ".join(NAMES)} and {_PREFIX}NAME'
        )
    if fastchat.conv_templates[registered].sep_style is None:
        raise ValueError(f'template "{name}" holds no text format, it is for a model behind an API')
    kind = Llama2Template if registered == "llama-2" else FastchatTemplate
    template = kind(registered if registered in ("llama-2", "vicuna_v1.1") else name, registered)
    try:
        template.segments(Conversation(None, _SENTENCES))
    except ValueError as error:
        raise ValueError(f"{error}; answers cannot be told apart in it: choose one of {', '.join(NAMES)}") from None
    return template


def _suggestion(name: str) -> str:
    near = nearest(name, NAMES, likeness=0.5)
    if near is None:
        theirs = nearest(name, fastchat.conv_templates, likeness=0.5)
        near = None if theirs is None else _PREFIX + theirs
    return f'; did you mean "{near}"?' if near else ""


def _head(conversation: Conversation, turns: int) -> Conversation:
    return Conversation(
        conversation.system,
        conversation.turns[:turns],
        conversation.instruction,
        conversation.input,
        conversation.source,
    )


def _end_token(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    if not tokenizer.eos_token:
        raise ValueError(f'template "{name}" closes answers with the end token, but the tokenizer has no eos_token')
    return str(tokenizer.eos_token)
