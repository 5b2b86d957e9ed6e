"""The tokenizer's chat template: labels lie exactly on what transformers says a model generates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from salient_ds.data.chat_source import fixed_date_note
from salient_ds.data.chat_template import TokenizerTemplate
from salient_ds.data.conversation import ASSISTANT, USER, Conversation, RowError, Turn
from salient_ds.data.record import template_record
from salient_ds.data.templates import get_template
from salient_ds.data.tokenize import tokenize_conversation

START = "{{ '<|im_start|>' + m['role'] + '\n' }}"
OPENS = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
MARKED = (
    "{% for m in messages %}" + START + "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{{ '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}" + OPENS
)  # fmt: skip
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LAST = (
    "{% set ns = namespace(q=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.q = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
STRIPS = (
    LAST + "{% for m in messages %}" + START + "{% if m.role == 'assistant' and loop.index0 < ns.q and '</think>' in "
    "m.content %}{{ m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}" + OPENS
)  # fmt: skip
"""Qwen3's rule: thoughts of answers before the last question are dropped."""
THINKS = (
    LAST + "{% for m in messages %}" + START + "{% if m.role == 'assistant' and loop.index0 > ns.q %}"
    "{% if '</think>' in m.content %}{{ '<think>\n' + m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
    "+ '\n</think>\n\n' + m.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ '<think>\n\n</think>\n\n' + "
    "m.content }}{% endif %}{% elif m.role == 'assistant' %}{{ m.content.split('</think>')[-1].lstrip('\n') }}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)  # fmt: skip
"""Qwen3.5's rule: the prompt opens a thought; answers after the last question have one, earlier ones none."""
DROPS = "{% for m in messages %}" + START + "{{ m.content.split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
R1 = DROPS + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
"""DeepSeek-R1's rule: the prompt opens a thought, and no thought is ever in the text."""


def talk(*texts: str, **more: Any) -> Conversation:
    """Turns of user and assistant in alternation."""
    turns = [Turn(USER if k % 2 == 0 else ASSISTANT, text) for k, text in enumerate(texts)]
    return Conversation(more.pop("system", None), tuple(turns), **more)


def trained(tokenizer: Any, conversation: Conversation) -> list[str]:
    """Per example the texts that are trained on."""
    found = TokenizerTemplate().examples(conversation, tokenizer)
    return ["|".join(s.text for s in example if s.is_answer) for example in found]


words = st.text(st.sampled_from("abc déß漢 ,.\n<>/|"), min_size=1, max_size=12).map(str.strip).filter(bool)
conversations = st.lists(st.tuples(words, words), min_size=1, max_size=4)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=conversations, system=st.none() | words)
def test_labels_are_transformers_own_assistant_mask(
    chatml: Any, pairs: list[tuple[str, str]], system: str | None
) -> None:
    """With generation markers: token by token, label by label; the unmarked template gives the same."""
    chatml.chat_template = MARKED
    conversation = talk(*(text for pair in pairs for text in pair), system=system)
    expected = chatml.apply_chat_template(
        conversation.messages(), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    found = tokenize_conversation(conversation, get_template("tokenizer"), chatml)
    length = len(found["input_ids"])  # our text ends with the last end token: what follows it carries no label
    assert found["input_ids"].tolist() == expected["input_ids"][:length]
    assert (found["labels"] != -100).astype(int).tolist() == expected["assistant_masks"][:length]
    assert not any(expected["assistant_masks"][length:])
    chatml.chat_template = UNMARKED
    plain = tokenize_conversation(conversation, get_template("tokenizer"), chatml)
    assert all(np.array_equal(plain[name], found[name]) for name in ("input_ids", "labels"))


@pytest.mark.parametrize("template", [MARKED, UNMARKED])
def test_answers_that_are_not_trained_on_carry_no_labels(chatml: Any, template: str) -> None:
    chatml.chat_template = template
    conversation = talk("a?", "bad", "b?", "good")
    marked = (conversation.turns[0], conversation.turns[1]._replace(train=False), *conversation.turns[2:])
    assert trained(chatml, Conversation(None, marked)) == ["good<|im_end|>"]


def test_history_that_is_rewritten_becomes_one_example_per_answer(chatml: Any) -> None:
    one, two = "<think>\none\n</think>\n\n4", "<think>\ntwo\n</think>\n\n6"
    for template, opened in ((STRIPS, "<think>\n"), (THINKS, "")):
        chatml.chat_template = template
        assert trained(chatml, talk("2+2?", one, "3+3?", two)) == [
            f"{opened}one\n</think>\n\n4<|im_end|>", f"{opened}two\n</think>\n\n6<|im_end|>",
        ]  # fmt: skip
        (last,) = TokenizerTemplate("last_answer").examples(talk("2+2?", one, "3+3?", two), chatml)
        assert last[-1].text.endswith("6<|im_end|>") and "".join(s.text for s in last).count("one") == 0
    chatml.chat_template = STRIPS
    assert trained(chatml, talk("2+2?", "4", "3+3?", "6")) == ["4<|im_end|>|6<|im_end|>"], "nothing is rewritten"
    chatml.chat_template = THINKS
    plain = ["\n</think>\n\n4<|im_end|>", "\n</think>\n\n6<|im_end|>"]
    assert trained(chatml, talk("2+2?", "4", "3+3?", "6")) == plain
    assert trained(chatml, talk("2+2?", "4")) == plain[:1]


def test_a_prompt_that_opens_a_thought_which_the_answer_lacks(chatml: Any) -> None:
    chatml.chat_template = R1
    assert trained(chatml, talk("2+2?", "4")) == ["4<|im_end|>"]
    with pytest.raises(RowError, match="it drops 'two and two' of the answer"):
        trained(chatml, talk("2+2?", "<think>two and two</think>4"))


TOOLS = "{% if tools %}{{ 'TOOLS ' + (tools | tojson) + '\n' }}{% endif %}"
CALLS = "{% for c in (m.tool_calls or []) %}{{ 'CALL ' + (c.function | tojson) }}{% endfor %}"
REASONS = "{% if m.reasoning_content %}{{ '[R]' + m.reasoning_content + '[/R]' }}{% endif %}"
FULL = (
    TOOLS
    + "{% for m in messages %}"
    + START
    + REASONS
    + "{{ m['content'] }}"
    + CALLS
    + "{{ '<|im_end|>\n' }}{% endfor %}"
    + OPENS
)
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
TOOL = {"type": "function", "function": {"name": "weather"}}


def with_calls() -> Conversation:
    turns = (
        Turn(USER, "Weather?"), Turn(ASSISTANT, "", True, {"tool_calls": [CALL]}), Turn("tool", "rain"),
        Turn(ASSISTANT, "It rains.", True, {"reasoning_content": "easy"}),
    )  # fmt: skip
    return Conversation(None, turns, tools=[TOOL])


def test_tools_calls_and_reasoning_are_rendered_and_trained(chatml: Any) -> None:
    chatml.chat_template = FULL
    conversation = with_calls()
    (example,) = TokenizerTemplate().examples(conversation, chatml)
    text = "".join(segment.text for segment in example)
    whole = chatml.apply_chat_template(conversation.messages(), tools=[TOOL], tokenize=False)
    assert whole == text + "\n"
    assert [segment.text for segment in example if segment.is_answer] == [
        'CALL {"name": "weather", "arguments": {"city": "Ulm"}}<|im_end|>', "[R]easy[/R]It rains.<|im_end|>",
    ]  # fmt: skip


@pytest.mark.parametrize(("part", "key"), [(TOOLS, "tools"), (CALLS, "tool_calls"), (REASONS, "reasoning_content")])
def test_what_the_template_does_not_print_is_refused(chatml: Any, part: str, key: str) -> None:
    chatml.chat_template = FULL.replace(part, "")
    with pytest.raises(RowError, match=f'does not print "{key}"') as caught:
        TokenizerTemplate().examples(with_calls(), chatml)
    assert caught.value.kind == key


def test_template_variables(chatml: Any) -> None:
    chatml.chat_template = UNMARKED + "{% if shout %}{{ '!' }}{% endif %}"
    conversation = talk("a", "b", template_kwargs={"shout": True})
    assert TokenizerTemplate()._render(conversation, chatml).endswith("!")
    with pytest.raises(RowError, match="does not read 'whisper'"):
        TokenizerTemplate().examples(talk("a", "b", template_kwargs={"whisper": True}), chatml)


@pytest.mark.parametrize("name", ["alpaca", "vicuna_v1.1", "llama-2"])
def test_other_templates_have_no_place_for_them(name: str) -> None:
    template = get_template(name)
    reasons = Turn(ASSISTANT, "b", True, {"reasoning_content": "c"})
    for conversation, key in (
        (talk("a", "b", tools=[TOOL]), "tools"),
        (talk("a", "b", template_kwargs={"x": 1}), "chat_template_kwargs"),
        (Conversation(None, (Turn(USER, "a"), reasons)), "reasoning_content"),
        (Conversation(None, with_calls().turns), "tool_calls"),
    ):  # fmt: skip
        with pytest.raises(RowError, match=f'no place for "{key}"') as caught:
            template.examples(conversation)
        assert caught.value.kind == key


def test_a_date_in_the_template_is_fixed(chatml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chatml.chat_template = "{{ strftime_now('%Y-%m-%d') }} {{ date_string }}\n" + UNMARKED
    assert TokenizerTemplate()._render(talk("a", "b"), chatml).startswith("2024-07-26 26 Jul 2024\n")
    assert "fixed to 26 Jul 2024" in str(fixed_date_note(chatml))
    assert template_record(TokenizerTemplate(), chatml) == template_record(TokenizerTemplate(), chatml)
    chatml.chat_template = "{% set f = '%Y' %}{{ strftime_now(f) }}" + UNMARKED
    with pytest.raises(ValueError, match="today's date in a form that changes"):
        TokenizerTemplate().examples(talk("a", "b"), chatml)


def test_rewriting_templates_have_a_record(chatml: Any) -> None:
    chatml.chat_template = THINKS
    assert "</think>" in template_record(TokenizerTemplate(), chatml).sample
