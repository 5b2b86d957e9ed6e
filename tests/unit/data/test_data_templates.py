"""Templates: published texts literally, segments that add up to them, records that notice any change."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from fastchat.conversation import conv_templates, get_conv_template

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, Turn
from salient_ds.data.record import TemplateRecord, check_record, template_record
from salient_ds.data.templates import ALPACA_REGISTERED, NAMES, Template, get_template

WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Input:\n{}\n\n### Response:"
)
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def ask(*texts: str, system: str | None = None) -> Conversation:
    """Turns by user and assistant in turn."""
    return Conversation(system, tuple(Turn((USER, ASSISTANT)[k % 2], text) for k, text in enumerate(texts)))


def usable_fastchat() -> list[str]:
    names = []
    for name in sorted(conv_templates):
        try:
            get_template(f"fastchat:{name}")
        except ValueError:
            continue
        names.append(f"fastchat:{name}")
    return names


def test_alpaca_is_stanfords_text(task: Conversation) -> None:
    alpaca = get_template("alpaca")
    assert alpaca.segments(ask("Add 1 and 2.", "3")) == [
        (WITHOUT_INPUT.format("Add 1 and 2."), False),
        ("3</s>", True),
    ]
    assert alpaca.segments(task) == [
        (WITH_INPUT.format("Translate.", "cheese"), False),
        ("fromage</s>", True),
    ]
    no_input = dataclasses.replace(task, turns=(Turn(USER, "Translate."), task.turns[1]), input="")
    assert alpaca.text(no_input) == WITHOUT_INPUT.format("Translate.") + "fromage</s>"


def test_fastchats_own_alpaca_is_another_text() -> None:
    """Why ours is registered under a name of its own."""
    conversation = ask("Q", "A")
    assert get_template("fastchat:alpaca").text(conversation) != get_template("alpaca").text(conversation)
    assert get_conv_template("alpaca").sep2 == "</s>"
    registered = get_conv_template(ALPACA_REGISTERED)
    registered.append_message(registered.roles[0], "Q")
    registered.append_message(registered.roles[1], None)
    assert registered.get_prompt() == WITHOUT_INPUT.format("Q")


def test_alpaca_second_turn_and_system() -> None:
    texts = [
        segment.text for segment in get_template("alpaca").segments(ask("Q1", "A1", "Q2", "A2", system="Be brief."))
    ]
    assert texts == [
        "Be brief.\n\n### Instruction:\nQ1\n\n### Response:",
        "A1</s>",
        "\n\n### Instruction:\nQ2\n\n### Response:",
        "A2</s>",
    ]


def test_vicuna_is_fastchats_text(two_turns: Conversation) -> None:
    vicuna = get_template("vicuna_v1.1")
    assert vicuna.segments(ask("Q1", "A1", "Q2", "A2")) == [
        (VICUNA + "USER: Q1 ASSISTANT:", False),
        (" A1</s>", True),
        ("USER: Q2 ASSISTANT:", False),
        (" A2</s>", True),
    ]
    chat = get_conv_template("vicuna_v1.1")
    chat.set_system_message(two_turns.system)
    for turn in two_turns.turns:
        chat.append_message(chat.roles[turn.role == ASSISTANT], turn.text)
    assert vicuna.text(two_turns) == chat.get_prompt()


def test_llama2_is_the_published_format(llama: Any) -> None:
    """Each exchange is BOS + "[INST] question [/INST] answer " + EOS, texts stripped
    (llama/generation.py)."""
    template = get_template("llama-2")
    assert template.text(ask(" Q1\n", " A1", "Q2", "A2 ")) == ("[INST] Q1 [/INST] A1 </s><s>[INST] Q2 [/INST] A2 </s>")
    with_system = ask("Q1", "A1", "Q2", "A2", system="S")
    assert template.segments(with_system) == [
        ("[INST] <<SYS>>\nS\n<</SYS>>\n\nQ1 [/INST]", False),
        (" A1 </s>", True),
        ("<s>[INST] Q2 [/INST]", False),
        (" A2 </s>", True),
    ]
    assert template.segments(with_system, llama) == template.segments(with_system)


def test_end_and_beginning_are_the_tokenizers_own(chatml: Any) -> None:
    conversation = ask("Q1", "A1", "Q2", "A2")
    assert get_template("vicuna_v1.1").text(conversation, chatml).endswith("ASSISTANT: A2<|im_end|>")
    assert get_template("alpaca").segments(conversation, chatml)[1].text == "A1<|im_end|>"
    text = get_template("llama-2").text(conversation, chatml)
    assert text == "[INST] Q1 [/INST] A1 <|im_end|>[INST] Q2 [/INST] A2 <|im_end|>", "this tokenizer has no BOS"
    chatml.eos_token = None
    with pytest.raises(ValueError, match=r'"alpaca" closes answers.*no eos_token'):
        get_template("alpaca").text(conversation, chatml)


def test_tokenizer_template(chatml: Any, two_turns: Conversation) -> None:
    template = get_template("tokenizer")
    segments = template.segments(two_turns, chatml)
    assert [segment.text for segment in segments if segment.is_answer] == [
        "The Elbe é.<|im_end|>",
        "Dresden<|im_end|>",
    ]
    whole = chatml.apply_chat_template(two_turns.messages(), tokenize=False)
    assert "".join(segment.text for segment in segments) + "\n" == whole, "only the line end after the last answer goes"
    with pytest.raises(ValueError, match="cannot be rendered without one"):
        template.text(two_turns)


def test_tokenizer_template_as_smollm2_has_it(chatml: Any) -> None:
    """Its beginning token opens every turn, and it brings a system message of its own."""
    chatml.bos_token = "<|im_start|>"
    own = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    chatml.chat_template = own + chatml.chat_template
    segments = get_template("tokenizer").segments(ask("Q", "A"), chatml)
    prompt = "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    assert segments == [(prompt, False), ("A<|im_end|>", True)]


def test_chatml_is_the_same_text_with_every_tokenizer(llama: Any, chatml: Any) -> None:
    conversation, template = ask("Name a river.", "The Elbe.", "Another?", "Oder"), get_template("chatml")
    segments = template.segments(conversation, llama)
    assert segments == template.segments(conversation, chatml)
    assert "".join(segment.text for segment in segments).startswith(
        "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\nThe Elbe.<|im_end|>\n<|im_start|>user\n"
    )
    assert [segment.text for segment in segments if segment.is_answer] == ["The Elbe.<|im_end|>", "Oder<|im_end|>"]
    with_system = template.segments(ask("Name a river.", "Elbe", system="Be brief."), llama)
    assert with_system[0].text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")


def test_tokenizer_without_chat_template(llama: Any, two_turns: Conversation) -> None:
    with pytest.raises(ValueError, match=r"has no chat template; choose one of alpaca"):
        get_template("tokenizer").text(two_turns, llama)


def test_tokenizer_template_that_adds_to_the_last_answer(chatml: Any, two_turns: Conversation) -> None:
    """As Qwen3's: an empty thought goes before the last answer only; it is generated, so it is trained on."""
    chatml.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
        "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    answers = [segment.text for segment in get_template("tokenizer").segments(two_turns, chatml) if segment.is_answer]
    assert answers == ["The Elbe é.<|im_end|>", "<think>\n\n</think>\n\nDresden<|im_end|>"]


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (
            "{{ raise_exception('System role not supported') }}",
            "refuses this conversation: System role not supported",
        ),
        ("{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}", "no end token"),
        (
            "{% for m in messages %}{{ m['content'] | upper + '<|im_end|>' }}{% endfor %}",
            "no place for the system message",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}",
            "does not begin",
        ),
        (
            "{% for m in messages %}"
            "{{ (m['content'] if loop.index0 < 2 else m['content'] | upper) + '<|im_end|>' }}{% endfor %}",
            "it drops 'The Elbe é.'",
        ),
    ],
)
def test_tokenizer_template_that_cannot_be_cut(
    chatml: Any, two_turns: Conversation, chat_template: str, message: str
) -> None:
    chatml.chat_template = chat_template
    with pytest.raises(ValueError, match=message):
        get_template("tokenizer").segments(two_turns, chatml)


def test_date_of_a_chat_template_is_fixed(chatml: Any) -> None:
    chatml.chat_template = "{{ date_string if date_string is defined else strftime_now('%c') }}" + chatml.chat_template
    assert get_template("tokenizer").text(ask("Q", "A"), chatml).startswith("26 Jul 2024<|im_start|>")


def check_round_trip(template: Template, conversation: Conversation, tokenizer: Any) -> None:
    """prompt + answer + end = training text, for the last answer and for every one before it."""
    segments = template.segments(conversation, tokenizer)
    assert [segment.is_answer for segment in segments] == [False, True] * len(conversation.answers)
    text = ""
    for k, answer in enumerate(conversation.answers):
        head = dataclasses.replace(conversation, turns=conversation.turns[: 2 * k + 1])
        text += segments[2 * k].text
        assert text == template.prompt(head, tokenizer)
        text += segments[2 * k + 1].text
        assert segments[2 * k + 1].text.strip().startswith(answer.strip())
        assert len(segments[2 * k + 1].text) > len(answer), "an end marker closes the answer"
    assert text == template.text(conversation, tokenizer)
    if conversation.system is not None:
        assert conversation.system in text


@pytest.mark.parametrize("name", NAMES)
def test_round_trip(name: str, chatml: Any, task: Conversation, two_turns: Conversation) -> None:
    template = get_template(name)
    assert template.name == name
    for conversation in (task, two_turns, dataclasses.replace(two_turns, system=None)):
        check_round_trip(template, conversation, chatml)


def test_fastchat_templates_round_trip_or_are_refused(two_turns: Conversation) -> None:
    usable = usable_fastchat()
    assert len(usable) > 20 and "fastchat:qwen-7b-chat" in usable and "fastchat:zero_shot" in usable
    for name in usable:
        check_round_trip(get_template(name), dataclasses.replace(two_turns, system=None), None)
    with pytest.raises(ValueError, match=r'"fastchat:raw".*choose one of alpaca'):
        get_template("fastchat:raw")
    with pytest.raises(ValueError, match=r'"fastchat:chatgpt" holds no text'):
        get_template("fastchat:chatgpt")


def test_fastchat_template_with_examples_inside_trains_on_the_answers_given_only() -> None:
    segments = get_template("fastchat:one_shot").segments(ask("Q", "A"))
    assert [segment.is_answer for segment in segments] == [False, True] and segments[1].text == " A\n###"


def test_system_message_is_never_dropped() -> None:
    refusing = [
        name
        for name in usable_fastchat()
        if "{system_message}" not in get_conv_template(name.removeprefix("fastchat:")).system_template
    ]
    for name in refusing:
        with pytest.raises(ValueError, match="no place for the system message"):
            get_template(name).text(ask("Q", "A", system="Be brief."))
    assert refusing, "fastchat has templates without a place for it"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("alpacca", "alpaca"),
        ("vicuna", "vicuna_v1.1"),
        ("llama2", "llama-2"),
        ("qwen-chat", "fastchat:qwen-7b-chat"),
        ("fastchat:zephir", "fastchat:zephyr"),
        ("tokeniser", "tokenizer"),
    ],
)
def test_unknown_name(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match="unknown template") as caught:
        get_template(name)
    assert f'did you mean "{nearest}"?' in str(caught.value) and "known are alpaca, vicuna_v1.1" in str(caught.value)


def test_fastchat_prefix_on_a_named_template_is_the_same_template() -> None:
    assert get_template("fastchat:vicuna_v1.1").name == "vicuna_v1.1"
    assert template_record(get_template("fastchat:llama-2")) == template_record(get_template("llama-2"))


@pytest.mark.parametrize("name", NAMES)
def test_record_survives_json_and_checks(name: str, chatml: Any) -> None:
    record = template_record(get_template(name), chatml)
    assert record.name == name and len(record.sha256) == 64 and "fromage" in record.sample
    again = TemplateRecord.from_dict(record.to_dict())
    check_record(again, get_template(name), chatml)


def test_record_tells_templates_and_tokenizers_apart(llama: Any, chatml: Any) -> None:
    records = [template_record(get_template(name), chatml) for name in (*NAMES, "fastchat:alpaca")]
    assert len({record.sha256 for record in records}) == len(records)
    record = template_record(get_template("alpaca"), llama)
    with pytest.raises(ValueError, match='trained with template "alpaca", asked for "llama-2"'):
        check_record(record, get_template("llama-2"), llama)
    with pytest.raises(ValueError, match=r"does not render as in training.*</s>.*<\|im_end\|>"):
        check_record(record, get_template("alpaca"), chatml)


def test_record_notices_a_changed_chat_template(chatml: Any) -> None:
    template = get_template("tokenizer")
    record = template_record(template, chatml)
    chatml.chat_template = "Hello. " + chatml.chat_template
    with pytest.raises(ValueError, match="does not render as in training"):
        check_record(record, template, chatml)
    with pytest.raises(ValueError, match="without sha256"):
        TemplateRecord.from_dict({"name": "alpaca", "sample": ""})


def test_record_of_a_template_that_takes_no_system_message(chatml: Any) -> None:
    chatml.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + chatml.chat_template
    )
    record = template_record(get_template("tokenizer"), chatml)
    assert record.sample.endswith("(takes no system message)")
    check_record(record, get_template("tokenizer"), chatml)


def test_record_is_stable() -> None:
    """These hashes are stored with adapters: a change here makes every adapter refuse to be evaluated."""
    hashes = {name: template_record(get_template(name)).sha256[:16] for name in ("alpaca", "vicuna_v1.1", "llama-2")}
    assert hashes == {
        "alpaca": "a5d4e645372caa14",
        "vicuna_v1.1": "11e9de2d894ccef1",
        "llama-2": "971359b4ae869c70",
    }
