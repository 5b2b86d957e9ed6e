"""Decide what a reply is, for judging, for ``doctor`` and for ``generate``: whether it ended, its text, its thought.

Services write the same thing in many ways. This is the only place that knows them:

* a thought: ``reasoning_content``, ``reasoning``, parts of type "thinking", or ``<think>...</think>`` in the text;
* the end: "stop" and its synonyms are good, "length" and its synonyms mean cut, an unknown reason is not good;
* a refusal: ``refusal``, or a part of that type.

A number inside a thought is no verdict, and the thought of a turn is no part of the conversation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from .verdicts import Reply

GOOD_ENDS = frozenset({"", "stop", "stop_sequence", "end_turn", "end", "eos", "eos_token", "completed"})
"""Finish reasons of complete replies, in lower case. A service that gives none is believed."""

CUT_ENDS = frozenset({
    "length", "max_tokens", "max_output_tokens", "max_completion_tokens", "max_length", "model_length",
    "model_context_window_exceeded", "token_limit",
})  # fmt: skip
"""Finish reasons of replies that were cut at a token limit."""

_OPEN = re.compile(r"\s*(?:<(think|thinking|thought|reasoning)>|\[(think)\])", re.IGNORECASE)
_CLOSE = re.compile(r"</(?:think|thinking)>|\[/think\]", re.IGNORECASE)
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
_NOT_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")
DEEPEST = 8
"""Parts nested more deeply are ignored."""

Ended = Literal["ok", "truncated", "broken"]


@dataclass(frozen=True)
class Outcome:
    """What a reply is. ``reason`` is empty if it ended well and has a text.

    Attributes:
        ended: ok, truncated (cut at a token limit) or broken (ended for another reason, or refused).
        text: the visible text without thoughts and outer blanks; "" if there is none.
        thought: the thoughts; "" if there are none.
    """

    ended: Ended
    text: str
    thought: str
    reason: str = ""


def outcome_of(reply: Reply) -> Outcome:
    """Decide whether a reply ended well, and separate its text from its thoughts.

    Example: ``<think>maybe [[9]]`` is a thought without a text, whatever its finish reason says.
    """
    text, inline, closed = split_thought(reply.text or "")
    thought = "\n\n".join(part for part in (reply.thought, inline) if part)
    end = reply.finish_reason.lower()
    if reply.refusal:
        return Outcome("broken", text, thought, f"refused: {reply.refusal[:300]}")
    within = " within its thought" if thought and not text else ""
    if end in CUT_ENDS:
        return Outcome("truncated", text, thought, f"reply cut at the token limit{within} ({reply.finish_reason})")
    if end not in GOOD_ENDS:
        shown = f"finish_reason {reply.finish_reason}"
        return Outcome("broken", text, thought, f"reply ended early: {shown}" if text else f"no content ({shown})")
    if not closed:
        return Outcome("broken", text, thought, "reply ended within its thought")
    if not text:
        instead = reply.instead or ("only a thought" if thought else "nothing but blanks" if reply.text else "")
        given = f"finish_reason {reply.finish_reason or 'not given'}"
        return Outcome("ok", "", thought, f"no content ({f'{instead}, ' if instead else ''}{given})")
    return Outcome("ok", text, thought)


def split_thought(text: str) -> tuple[str, str, bool]:
    """Split a text that begins with thoughts. Linear in its length.

    A chat template may put the opening tag into the prompt, so a text may begin within the thought. Tags further on
    belong to the text, because the text may be about such tags.

    Returns:
        (text without thoughts and outer blanks, thoughts, whether the last thought was closed).
    """
    thoughts: list[str] = []
    at = 0
    while opened := _OPEN.match(text, at):
        name = opened.group(1) or opened.group(2)
        close = f"</{name}>" if opened.group(1) else f"[/{name}]"
        found = re.compile(re.escape(close), re.IGNORECASE).search(text, opened.end())
        if found is None:
            return "", "\n\n".join([*thoughts, text[opened.end() :].strip()]), False
        thoughts.append(text[opened.end() : found.start()].strip())
        at = found.end()
    if not thoughts and (headless := _CLOSE.search(text)) and not _quoted(text, headless):
        thoughts.append(text[: headless.start()].strip())
        at = headless.end()
    return text[at:].strip(), "\n\n".join(part for part in thoughts if part), True


def may_think(text: str) -> bool:
    """Whether a text has a tag that :func:`split_thought` looks for. Others need not be split."""
    return bool(_OPEN.match(text) or _CLOSE.search(text))


def _quoted(text: str, tag: re.Match[str]) -> bool:
    """Whether a tag is named by the text: in quotation marks or backticks, or after its own opening tag."""
    around = text[max(0, tag.start() - 1) : tag.start()] + text[tag.end() : tag.end() + 1]
    opening = tag.group().replace("/", "").lower()
    return any(mark in around for mark in "`\"'") or opening in text[: tag.start()].lower()


def clean_text(text: str) -> tuple[str, int]:
    """Make a text that every codec and file format can hold.

    The two halves of a surrogate pair become their character. A lone half, NUL and other control characters (not tab
    and line ends) become U+FFFD.

    Returns:
        (the text, how many characters were replaced).
    """
    if not _NOT_TEXT.search(text):
        return text, 0
    joined = re.sub(
        "[\ud800-\udbff][\udc00-\udfff]",
        lambda pair: pair.group().encode("utf-16", "surrogatepass").decode("utf-16"),
        text,
    )
    return _NOT_TEXT.subn("\ufffd", joined)


def read_message(message: Any, plain: Any = None) -> dict[str, Any]:
    """Return the fields ``text``, ``thought``, ``refusal``, ``instead`` and ``cleaned`` of a :class:`Reply`.

    Args:
        message: the ``message`` of a choice. A wrong type anywhere in it counts as nothing there.
        plain: the ``text`` of a choice without a message (``/completions``).
    """
    given = message if isinstance(message, dict) else {"content": plain}
    parts = _Parts()
    content = given.get("content")
    parts.add(content, thought=False, depth=0)
    refusals = [given["refusal"]] if isinstance(given.get("refusal"), str) else []
    thoughts = [t for key in _THOUGHT_KEYS if isinstance(given.get(key), str) and (t := given[key].strip())]
    thoughts = list(dict.fromkeys([*thoughts, *("".join(parts.thoughts).strip(),)]))
    text = "".join(parts.texts) if parts.texts or isinstance(content, str) else None
    cleaned = 0
    fields: dict[str, Any] = {}
    for name, value in (
        ("text", text),
        ("thought", "\n\n".join(filter(None, thoughts))),
        ("refusal", "\n".join([*refusals, *parts.refusals]).strip()),
        ("instead", _instead(given, parts.others)),
    ):
        if value is None:
            fields[name] = None
            continue
        fields[name], replaced = clean_text(value)
        cleaned += replaced
    return {**fields, "cleaned": cleaned}


class _Parts:
    """Texts, thoughts, refusals and the names of other parts of a content, in their order."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.refusals: list[str] = []
        self.others: list[str] = []

    def add(self, content: Any, thought: bool, depth: int) -> None:
        if isinstance(content, str):
            (self.thoughts if thought else self.texts).append(content)
        elif isinstance(content, list) and depth < DEEPEST:
            for part in content:
                self.add(part, thought, depth + 1)
        elif isinstance(content, dict) and depth < DEEPEST:
            self._add_part(content, thought, depth)

    def _add_part(self, part: dict[str, Any], thought: bool, depth: int) -> None:
        kind = part.get("type")
        kind = kind if isinstance(kind, str) else "text"
        if kind == "refusal":
            self.refusals += [value for value in (part.get("refusal"),) if isinstance(value, str)]
        elif kind in ("thinking", "reasoning", "reasoning_content", "thought") or part.get("thought") is True:
            inner = next((part[key] for key in (*_THOUGHT_KEYS, "text", "content") if part.get(key)), None)
            self.add(inner, True, depth + 1)
        elif kind in ("text", "output_text"):
            self.add(part.get("text", part.get("content")), thought, depth + 1)
        else:
            self.others.append(kind[:40])


def _instead(message: dict[str, Any], others: list[str]) -> str:
    """Name what came in place of a text: tool calls, or parts that are no text."""
    calls = message.get("tool_calls")
    if isinstance(calls, list) and calls:
        function = calls[0].get("function") if isinstance(calls[0], dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        return f"a call of the tool {name[:60]!r}" if isinstance(name, str) else "a call of a tool"
    return f"a part of type {others[0]!r}" if others else ""
