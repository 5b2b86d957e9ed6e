"""What a prompt template is: it cuts a conversation's text into answers (trained on) and the rest. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from salient_ds.data.conversation import ASSISTANT, Conversation, RowError
from salient_ds.data.segments import Segment, cut_segments

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMES = ("alpaca", "vicuna_v1.1", "llama-2", "chatml", "tokenizer", "none")


class Template(ABC):
    """Renders conversations.

    `adds_bos`: whether the tokenizer's beginning-of-sequence token goes before the text. It is False for a tokenizer's
    own chat template, which contains all its special tokens.
    """

    name: str
    adds_bos: bool = True

    @abstractmethod
    def _render(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> str:
        """The text up to and including the last turn. After a turn that asks, also the words that open an answer."""

    @abstractmethod
    def _ends(self, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
        """Texts that may close an answer."""

    def examples(
        self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[list[Segment]]:
        """The training texts of a conversation, each cut into answers (trained on) and the rest.

        Without a tokenizer, LLaMA's special tokens are used. Almost always there is one text; see
        :class:`salient_ds.data.chat_template.TokenizerTemplate` for templates that rewrite history.

        Raises:
            RowError: with the file and line of the conversation, when the text would lack something that the row says
                (its system message, tools), or cannot be cut into prompts and answers.
        """
        return [self.segments(conversation, tokenizer)]

    def segments(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Segment]:
        """The whole conversation as one training text; raises like :meth:`examples`."""
        assert conversation.turns and conversation.turns[-1].role == ASSISTANT, "training text ends with an answer"
        answers = [(k, turn) for k, turn in enumerate(conversation.turns) if turn.role == ASSISTANT]
        prompts = [self.prompt(conversation.until(k), tokenizer) for k, _ in answers]
        try:
            cut = cut_segments(
                self._render(conversation, tokenizer), prompts, conversation.answers, self._ends(tokenizer)
            )
        except RowError:
            raise
        except ValueError as error:
            raise RowError("template", f'template "{self.name}" on {conversation.where}: {error}') from None
        wanted = iter(turn.train for _, turn in answers)
        return [Segment(text, is_answer and next(wanted)) for text, is_answer in cut]

    def prompt(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """The text that a model continues with an answer; `conversation` ends with a turn that asks for one.

        Raises:
            RowError: the template would drop the system message.
        """
        assert conversation.turns and conversation.turns[-1].role != ASSISTANT, "a prompt ends before an answer"
        text = self._render(conversation, tokenizer)
        self._require_system(conversation, text)
        return text

    def _require_system(self, conversation: Conversation, text: str) -> None:
        if conversation.system and conversation.system.strip() not in text:
            raise RowError(
                "system message",
                f'template "{self.name}" has no place for the system message of {conversation.where}: choose '
                "another template, or leave system messages out of the data",
            )

    def text(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
        """The whole training text."""
        return "".join(segment.text for segment in self.segments(conversation, tokenizer))
