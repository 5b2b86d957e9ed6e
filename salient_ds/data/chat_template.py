"""The tokenizer's own chat template: what transformers renders is what a model is trained on. No torch.

Three ways tell answers from the rest, in this order:

1. Generation markers ({% generation %}) in the template: exactly what stands between them is trained on.
2. The prompt of every answer is a prefix of the whole text: an answer reaches from there to its end token.
3. Neither, because the template rewrites history (Qwen3 drops the thoughts of earlier answers, Qwen3.5 opens <think>):
   every answer becomes an example of its own, rendered as the last one, as a model writes it. With
   ``data.rewritten_history: last_answer`` only the last one does.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast

from salient_ds.data.chat_messages import as_parts, parts_only, prints_repr, with_text_arguments
from salient_ds.data.chat_source import source_of, variables_of
from salient_ds.data.conversation import ASSISTANT, Conversation, RowError
from salient_ds.data.keys import REASONING_KEYS, TOOL_CALLS
from salient_ds.data.segments import Segment
from salient_ds.data.template_base import Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RewrittenHistory = Literal["per_answer", "last_answer"]
_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_BOUNDARY = re.compile(r"[\n>\]:]")


class TokenizerTemplate(Template):
    """The tokenizer's own chat template, by `apply_chat_template`.

    Args:
        rewritten_history: which answers become examples where the template rewrites earlier turns.
    """

    name = "tokenizer"
    adds_bos = False

    def __init__(self, rewritten_history: RewrittenHistory = "per_answer") -> None:
        self.rewritten_history = rewritten_history
        self._known_ends: tuple[object, int, list[str]] = (None, 0, [])
        self._parts_only: dict[str, bool] = {}

    def examples(
        self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> list[list[Segment]]:
        """One training text, or one per answer if the template rewrites history."""
        self._refuse_what_is_not_printed(conversation, tokenizer)
        if _MARKED.search(source_of(conversation, tokenizer)):
            return [self._marked(conversation, tokenizer)]
        try:
            return [self._cut(conversation, tokenizer)]
        except RowError as error:
            if error.kind in ("chat template", "system message"):
                raise
        answers = [k for k, turn in enumerate(conversation.turns) if turn.role == ASSISTANT and turn.train]
        chosen = answers if self.rewritten_history == "per_answer" else answers[-1:]
        return [self._as_last(conversation.until(k + 1), tokenizer) for k in chosen]

    def segments(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None = None) -> list[Segment]:
        """The only training text of a conversation; raises like :meth:`examples`, and RowError if there are several."""
        texts = self.examples(conversation, tokenizer)
        if len(texts) > 1:
            raise RowError(
                "history rewritten",
                f'template "{self.name}" on {conversation.where}: it rewrites earlier turns, so that every one of the '
                f"{len(texts)} answers is an example of its own",
            )
        return texts[0]

    def _cut(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> list[Segment]:
        """The whole text, if every prompt is a prefix of it and every answer stands in it unchanged."""
        if not any(turn.extra for turn in conversation.turns):
            return super().segments(conversation, tokenizer)
        whole, segments, cursor = self._render(conversation, tokenizer), [], 0
        for k, turn in enumerate(conversation.turns):
            if turn.role != ASSISTANT:
                continue
            prompt = self.prompt(conversation.until(k), tokenizer)
            until = self._render(conversation.until(k + 1), tokenizer)
            if not until.startswith(prompt) or not whole.startswith(until):
                raise RowError("history rewritten", "the template rewrites earlier turns")
            stop = self._end_of(until, len(prompt), tokenizer, conversation)
            segments += [Segment(whole[cursor : len(prompt)], False), Segment(whole[len(prompt) : stop], turn.train)]
            cursor = stop
        return segments

    def _as_last(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> list[Segment]:
        """A conversation whose last turn alone is trained on, rendered as transformers renders it."""
        text = self._render(conversation, tokenizer)
        prompt = self.prompt(conversation.until(len(conversation.turns) - 1), tokenizer)
        if not text.startswith(prompt):
            prompt = self._common_opening(conversation, prompt, text, tokenizer)
        if not prompt:
            raise RowError(
                "history rewritten",
                f'template "{self.name}" on {conversation.where}: the text does not begin with the prompt that '
                "generation would see, so that the answer cannot be told apart",
            )
        stop = self._end_of(text, len(prompt), tokenizer, conversation)
        answer = text[len(prompt) : stop]
        lost = [part for part in _visible_parts(conversation.turns[-1].text) if part not in text[len(prompt) :]]
        if lost:
            raise RowError(
                "answer changed",
                f'template "{self.name}" on {conversation.where}: it drops {lost[0][:40]!r} of the answer',
            )
        return [Segment(prompt, False), Segment(answer, True)]

    def _common_opening(
        self, conversation: Conversation, prompt: str, text: str, tokenizer: PreTrainedTokenizerBase | None
    ) -> str:
        """As much of the prompt as the text has; empty if that is less than the words that open an answer.

        A prompt may open a thought ("<think>") that the training text of this answer does not have. The cut lies after
        a tag, a colon or a line end, never inside of a word.
        """
        asked = conversation.until(len(conversation.turns) - 1)
        before = self._render(asked, tokenizer, opens=False)
        cuts = [len(before) + match.end() for match in _BOUNDARY.finditer(prompt[len(before) :])]
        return next((prompt[:cut] for cut in reversed(cuts) if text.startswith(prompt[:cut])), "")

    def _end_of(
        self, text: str, start: int, tokenizer: PreTrainedTokenizerBase | None, conversation: Conversation
    ) -> int:
        """Where the answer that begins at ``start`` and is the last of ``text`` ends, its end token included."""
        found = [at + len(end) for end in self._ends(tokenizer) if (at := text.rfind(end, start)) >= 0]
        if not found:
            raise RowError(
                "no end token",
                f'template "{self.name}" on {conversation.where}: no end token follows an answer: generation would '
                "never stop",
            )
        return max(found)

    def _marked(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None) -> list[Segment]:
        """The text with exactly what the template marks as generated trained on."""
        assert tokenizer is not None, "the source has been read"
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {**tokenizer.special_tokens_map, **variables_of(conversation)}
        (text,), (spans,) = self._guarded(
            conversation,
            tokenizer,
            lambda messages: render_jinja_template(
                [messages],
                tools=cast(Any, conversation.tools),
                chat_template=source_of(conversation, tokenizer),
                return_assistant_tokens_mask=True,
                **variables,
            ),
        )
        self._require_system(conversation, text)
        trained = [turn.train for turn in conversation.turns if turn.role == ASSISTANT]
        if not all(trained) and len(trained) != len(spans):
            raise RowError(
                "marks",
                f'template "{self.name}" on {conversation.where}: it marks {len(spans)} spans for {len(trained)} '
                "answers, so that an answer that is not trained on cannot be told apart",
            )
        if not spans:
            raise RowError(
                "no answer marked", f'template "{self.name}" on {conversation.where}: it marks no answer as generated'
            )
        segments, cursor = [], 0
        for k, (start, stop) in enumerate(spans):
            wanted = trained[k] if len(trained) == len(spans) else True
            segments += [Segment(text[cursor:start], False), Segment(text[start:stop], wanted)]
            cursor = stop
        return [segment for segment in segments if segment.text]

    def _render(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None, opens: bool = True) -> str:
        """The text; ``opens``: after a turn that asks, also the words that open an answer."""
        source = source_of(conversation, tokenizer)
        assert tokenizer is not None, "the source has been read"
        return str(
            self._guarded(
                conversation,
                tokenizer,
                lambda messages: tokenizer.apply_chat_template(
                    messages,
                    tools=cast(Any, conversation.tools),
                    chat_template=source,
                    tokenize=False,
                    add_generation_prompt=opens and conversation.turns[-1].role != ASSISTANT,
                    **variables_of(conversation),
                ),
            )
        )

    def _guarded(
        self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase, render: Callable[[list[Any]], Any]
    ) -> Any:
        """What ``render`` makes of the messages, in the form in which the template reads them.

        Templates differ in two things. Some read content as a list of parts only. And some take the arguments of a
        tool call as JSON text: given an object, they fail, or print it as Python does.
        """
        import jinja2

        messages = conversation.messages()
        try:
            if self._reads_parts_only(conversation, tokenizer):
                messages = as_parts(messages)
            in_text = with_text_arguments(messages)
            try:
                found = render(messages)
            except TypeError:
                if in_text is None:
                    raise
                return render(in_text)
            text = found if isinstance(found, str) else found[0][0]
            return render(in_text) if in_text is not None and prints_repr(messages, text) else found
        except (jinja2.TemplateError, TypeError, AttributeError, KeyError) as error:
            raise RowError(
                "chat template", f"the chat template of the tokenizer refuses {conversation.where}: {error}"
            ) from None

    def _reads_parts_only(self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> bool:
        source = source_of(conversation, tokenizer)
        if source not in self._parts_only:
            self._parts_only[source] = parts_only(source, tokenizer)
        return self._parts_only[source]

    def _refuse_what_is_not_printed(
        self, conversation: Conversation, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """Raise RowError for tools, tool calls, reasoning or variables that leave no trace in the text."""
        source = source_of(conversation, tokenizer)
        unread = [key for key in conversation.template_kwargs or {} if not re.search(rf"\b{re.escape(key)}\b", source)]
        if unread:
            raise RowError(
                "chat_template_kwargs",
                f"the chat template does not read {unread[0]!r}, which chat_template_kwargs of {conversation.where} "
                "sets: remove it, or use another template",
            )
        whole = None
        if conversation.tools:
            whole = self._render(conversation, tokenizer)
            if self._render(_without_tools(conversation), tokenizer) == whole:
                raise RowError("tools", _not_printed("tools", conversation))
        for k, turn in enumerate(conversation.turns):
            for key in (TOOL_CALLS, *REASONING_KEYS):
                if turn.extra and key in turn.extra:
                    until = conversation.until(k + 1)
                    if self._render(_without_key(until, key), tokenizer) == self._render(until, tokenizer):
                        raise RowError(key, _not_printed(key, conversation))

    def _ends(self, tokenizer: PreTrainedTokenizerBase | None) -> list[str]:
        assert tokenizer is not None, "rendering has refused this already"
        owner, size, ends = self._known_ends
        if owner is not tokenizer or size != len(tokenizer):  # the list costs more to make than a rendering
            special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
            special |= set(tokenizer.all_special_tokens)
            no_end = {tokenizer.bos_token, tokenizer.unk_token} - {tokenizer.eos_token}
            ends = sorted(special - no_end, key=lambda text: (-len(text), text))
            self._known_ends = (tokenizer, len(tokenizer), ends)
        return ends


def _without_tools(conversation: Conversation) -> Conversation:
    return replace(conversation, tools=None)


def _without_key(conversation: Conversation, key: str) -> Conversation:
    """The conversation whose last turn lacks ``key``."""
    *before, last = conversation.turns
    extra = {name: value for name, value in (last.extra or {}).items() if name != key}
    return replace(conversation, turns=(*before, last._replace(extra=extra or None)))


def _not_printed(key: str, conversation: Conversation) -> str:
    return (
        f'the chat template of the tokenizer does not print "{key}" of {conversation.where}: the model would never see '
        "it; use a template that does, or leave such rows out"
    )


def _visible_parts(answer: str) -> list[str]:
    """The pieces of an answer that have to be in the text: its thought, and what follows it."""
    parts = re.split(r"</?think>", answer)
    return [part.strip() for part in parts if part.strip()]
