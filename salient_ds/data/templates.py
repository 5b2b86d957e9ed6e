"""Prompt templates: they turn a conversation into text segments, each an answer (trained on) or not. No torch.

Six templates have a short name. All others of fastchat are "fastchat:NAME":
alpaca       Stanford Alpaca's training text (tatsu-lab/stanford_alpaca, train.py), with and without an input
vicuna_v1.1  fastchat's own, which Vicuna was trained with
llama-2      fastchat's own: `[INST] question [/INST] answer </s><s>[INST] ...`, as Llama 2 was trained
chatml       <|im_start|>role, text, <|im_end|>
tokenizer    the tokenizer's chat template
none         nothing but the texts, and the end token after each answer

An answer's segment starts where the prompt for generation ends. So its leading blank (as in "ASSISTANT: yes") is
trained on. The segment ends with the end token; what follows up to the next prompt is not trained on. The text of a
training example ends with its last end token: for every template, the text is prompt + answer + end.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fastchat import conversation as fastchat

from salient_ds.data.chat_template import RewrittenHistory, TokenizerTemplate
from salient_ds.data.conversation import ASSISTANT, TOOL, USER, Conversation, RowError, Turn
from salient_ds.data.template_base import NAMES, Template
from salient_ds.strict import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPACA_REGISTERED = "salient_alpaca"
_PREFIX = "fastchat:"
_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)
_SENTENCES = (
    Turn(USER, "Name a river."),
    Turn(ASSISTANT, "The Elbe."),
    Turn(USER, "And a city on it?"),
    Turn(ASSISTANT, "Dresden."),
)


class FastchatTemplate(Template):
    """A template of fastchat's registry. The tokenizer's end and beginning tokens replace its "</s>" and "<s>"."""

    def __init__(self, name: str, registered: str) -> None:
        self.name = name
        self.registered = registered

    def _render(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> str:
        self._refuse_what_has_no_place(conversation)
        chat = self._empty(tokenizer)
        if conversation.system is not None:
            chat.set_system_message(conversation.system)
        for turn in conversation.turns:
            chat.append_message(chat.roles[turn.role == ASSISTANT], turn.text)
        if conversation.turns[-1].role == USER:
            chat.append_message(chat.roles[1], None)
        return str(chat.get_prompt())

    def _refuse_what_has_no_place(self, conversation: Conversation) -> None:
        """Raise RowError for what only a tokenizer's own chat template can print."""
        found = ["tools"] if conversation.tools else []
        found += ["chat_template_kwargs"] if conversation.template_kwargs else []
        for turn in conversation.turns:
            found += [TOOL] if turn.role == TOOL else []
            found += list(turn.extra or ())
        if found:
            raise RowError(
                found[0],
                f'template "{self.name}" has no place for "{found[0]}" of {conversation.where}: use the tokenizer\'s '
                'own chat template (template "tokenizer"), or leave such rows out',
            )

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

    def __reduce__(self) -> tuple[type[AlpacaTemplate], tuple[()]]:
        """Pickled for another process, which has to register the template, too."""
        return AlpacaTemplate, ()

    def _render(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> str:
        if conversation.input:
            question = f"{conversation.instruction}\n\n### Input:\n{conversation.input}"
            turns = (conversation.turns[0]._replace(text=question), *conversation.turns[1:])
            conversation = replace(conversation, system=conversation.system or _ALPACA_WITH_INPUT, turns=turns)
        return super()._render(conversation, tokenizer)


class ChatMLTemplate(FastchatTemplate):
    """ChatML as OpenAI and many models write it: <|im_start|>ROLE, a line end, the text, <|im_end|>, a line end.

    Unlike fastchat's templates of this form it has no system message of its own. Special tokens are those of the text:
    a tokenizer that does not know them spells them out.
    """

    adds_bos = False

    def __init__(self) -> None:
        super().__init__("chatml", "chatml")

    def _render(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> str:
        self._refuse_what_has_no_place(conversation)
        parts = [(message["role"], message["content"]) for message in conversation.messages()]
        text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in parts)
        return text + ("<|im_start|>assistant\n" if conversation.turns[-1].role != ASSISTANT else "")

    def _ends(self, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
        return ["<|im_end|>"]


class BareTemplate(FastchatTemplate):
    """The texts of all turns as they are, one after the other, and the end token after each answer.

    Example: the prompt "2 + 3 =" and the completion " 5" become "2 + 3 = 5</s>".
    """

    def __init__(self) -> None:
        super().__init__("none", "raw")

    def _render(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> str:
        self._refuse_what_has_no_place(conversation)
        end = "</s>" if tokenizer is None else _end_token(tokenizer, self.name)
        texts = [turn.text + (end if turn.role == ASSISTANT else "") for turn in conversation.turns]
        return "".join([conversation.system or "", *texts])

    def _ends(self, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
        return ["</s>" if tokenizer is None else _end_token(tokenizer, self.name)]


class Llama2Template(FastchatTemplate):
    """Llama 2's chat format. Texts are stripped, as in the released `chat_completion` (llama/generation.py)."""

    def _render(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> str:
        # With a system message, "<<SYS>>...<</SYS>>\n\n" + question is stripped as one text, so the question itself is
        # not stripped on the left.
        turns = tuple(
            turn._replace(text=turn.text.rstrip() if k == 0 and conversation.system else turn.text.strip())
            for k, turn in enumerate(conversation.turns)
        )
        return super()._render(replace(conversation, turns=turns), tokenizer)


def get_template(name: str, rewritten_history: RewrittenHistory = "per_answer") -> Template:
    """The template called `name`: alpaca, vicuna_v1.1, llama-2, chatml, tokenizer, none, or fastchat:NAME.

    A fastchat template is accepted if a sample of two exchanges can be cut into prompts, answers and end markers.
    Raises ValueError for an unknown name (with the nearest known one), and for a template that cannot be cut (with the
    reason).
    """
    if name == "alpaca":
        return AlpacaTemplate()
    if name == "chatml":
        return ChatMLTemplate()
    if name == "none":
        return BareTemplate()
    if name == "tokenizer":
        return TokenizerTemplate(rewritten_history)
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


def known_templates() -> list[str]:
    """Names of FastChat's templates that a run can use, as "fastchat:NAME"."""
    found = []
    for registered in fastchat.conv_templates:
        if registered == ALPACA_REGISTERED:
            continue
        try:
            get_template(_PREFIX + registered)
        except ValueError:
            continue
        found.append(_PREFIX + registered)
    return found


def _suggestion(name: str) -> str:
    known = {**{theirs: _PREFIX + theirs for theirs in fastchat.conv_templates}, **{ours: ours for ours in NAMES}}
    near = nearest(name, known, likeness=0.5)
    return f'; did you mean "{known[near]}"?' if near else ""


def _end_token(tokenizer: PreTrainedTokenizerBase, name: str) -> str:
    if not tokenizer.eos_token:
        raise ValueError(f'template "{name}" closes answers with the end token, but the tokenizer has no eos_token')
    return str(tokenizer.eos_token)
