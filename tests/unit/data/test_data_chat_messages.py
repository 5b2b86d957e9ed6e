"""Tool calls and content in every form in which data have them and templates read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salient_ds.data.chat_messages import as_parts, parts_only, prints_repr, with_text_arguments
from salient_ds.data.conversation import Conversation, DataError
from salient_ds.data.formats import read_rows
from salient_ds.data.templates import get_template
from salient_ds.data.tokenize import tokenize_conversation

Write = Callable[..., Path]
ARGUMENTS = {"city": "Köln", "days": 2}
AS_JSON = json.dumps(ARGUMENTS, ensure_ascii=False)
HEAD, TAIL = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}", "{{ '<|im_end|>\n' }}{% endfor %}"
OPENS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
CALLS = "{{ m.content }}{% for c in m.tool_calls or [] %}{{ 'CALL ' }}{{ c.function.ARGS }}{% endfor %}"
FORMS = {
    "json": "arguments | tojson(ensure_ascii=False)",
    "joined as text": "name + ' ' + c.function.arguments",
    "printed": "arguments",
    "either": "arguments if c.function.arguments is string else c.function.arguments | tojson(ensure_ascii=False)",
}


def template(form: str) -> str:
    return HEAD + CALLS.replace("ARGS", form) + TAIL + OPENS


def call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def row(turn: dict[str, Any], result: str = "tool") -> dict[str, Any]:
    return {"messages": [
        {"role": "user", "content": "Weather?"}, turn, {"role": result, "content": "rain"},
        {"role": "assistant", "content": "It rains."},
    ]}  # fmt: skip


def read(write: Write, one: dict[str, Any]) -> Conversation:
    (found,) = read_rows(write("a.jsonl", [one]))
    return found


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("arguments", [ARGUMENTS, AS_JSON], ids=["object", "text"])
def test_arguments_are_json_whatever_form_data_and_template_have(
    write: Write, chatml: Any, form: str, arguments: Any
) -> None:
    chatml.chat_template = template(form)
    found = read(write, row({"role": "assistant", "content": None, "tool_calls": [call(arguments)]}))
    text = get_template("tokenizer").text(found, chatml)
    assert AS_JSON in text and '\\"' not in text and "'city'" not in text
    labels = tokenize_conversation(found, get_template("tokenizer"), chatml)["labels"]
    assert AS_JSON in chatml.decode(labels[labels != -100])


def test_openais_older_keys_are_the_same_conversation(write: Write) -> None:
    older = row({"role": "assistant", "content": None, "function_call": {"name": "weather", "arguments": AS_JSON}},
                "function")  # fmt: skip
    newer = row({"role": "assistant", "content": None, "tool_calls": [call(ARGUMENTS)]})
    assert read(write, older).turns == read(write, newer).turns
    older["messages"].insert(0, {"role": "developer", "content": "Be brief."})
    assert read(write, older).system == "Be brief."


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        ({"tool_calls": [call("{city")]}, "arguments that are no JSON"),
        ({"function_call": "weather()"}, '"function_call"] is text'),
        ({"function_call": {"name": "x"}, "tool_calls": [call({})]}, "keep one"),
    ],
)
def test_calls_that_no_template_can_print_are_refused(write: Write, turn: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(write, row({"role": "assistant", "content": None, **turn}))


def test_no_arguments_are_an_empty_object(write: Write) -> None:
    found = read(write, row({"role": "assistant", "content": None, "tool_calls": [call("")]}))
    assert found.turns[1].extra == {"tool_calls": [call({})]}


PARTS = HEAD + "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}" + TAIL + OPENS
MARKED = HEAD + (
    "{% for p in m.content %}{% if m.role == 'assistant' %}{% generation %}{{ p.text }}{% endgeneration %}"
    "{% else %}{{ p.text }}{% endif %}{% endfor %}"
) + TAIL  # fmt: skip


@pytest.mark.parametrize("source", [PARTS, MARKED], ids=["cut", "marked"])
def test_a_template_that_reads_parts_only_gets_parts(write: Write, chatml: Any, source: str) -> None:
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "Elbe."}]
    question = {"role": "user", "content": "A river?"}
    chatml.chat_template = source
    for answer in ("The Elbe.", parts):
        found = read(write, {"messages": [question, {"role": "assistant", "content": answer}]})
        segments = get_template("tokenizer").segments(found, chatml)
        assert [text.removesuffix("<|im_end|>") for text, trained in segments if trained] == ["The Elbe."]
        assert "A river?" in segments[0].text


def test_which_form_a_template_reads(chatml: Any) -> None:
    assert parts_only(PARTS, chatml) and not parts_only(template("arguments"), chatml)
    assert not parts_only("{{ raise_exception('no') }}", chatml)
    messages = [{"role": "assistant", "content": "", "tool_calls": [call(ARGUMENTS)]}]
    assert with_text_arguments(messages) == [messages[0] | {"tool_calls": [call(AS_JSON)]}]
    assert with_text_arguments([{"role": "user", "content": "x"}]) is None
    assert prints_repr(messages, f"CALL {ARGUMENTS}") and not prints_repr(messages, AS_JSON)
    assert as_parts(messages)[0]["content"] == [{"type": "text", "text": ""}]
