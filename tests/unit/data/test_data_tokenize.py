"""Token ids and labels: what is trained on, beginning and end tokens, truncation, tokenizers with and without
offsets."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from salient_ds.data.conversation import ASSISTANT, USER, Conversation, Turn
from salient_ds.data.templates import get_template
from salient_ds.data.token_report import TokenizationReport
from salient_ds.data.tokenize import Example, count_targets, tokenize_all, tokenize_conversation


def answers_of(example: Example, tokenizer: Any) -> list[str]:
    """The texts of each run of labels."""
    runs: list[list[int]] = []
    inside = False
    for label in example["labels"].tolist():
        if label == -100:
            inside = False
        else:
            if not inside:
                runs.append([])
            runs[-1].append(label)
            inside = True
    return [tokenizer.decode(run) for run in runs]


def qa(question: str, answer: str) -> Conversation:
    return Conversation(None, (Turn(USER, question), Turn(ASSISTANT, answer)))


@pytest.mark.parametrize("kind", ["llama", "slow"])
@pytest.mark.parametrize("name", ["alpaca", "vicuna_v1.1", "llama-2"])
def test_labels_are_answers_and_their_end_tokens(request: Any, two_turns: Conversation, kind: str, name: str) -> None:
    tokenizer = request.getfixturevalue(kind)
    example = tokenize_conversation(two_turns, get_template(name), tokenizer)
    ids, labels = example["input_ids"], example["labels"]
    assert ids.dtype == labels.dtype == np.int32 and ids.shape == labels.shape
    space = " " if name == "llama-2" else ""
    assert [text.strip() for text in answers_of(example, tokenizer)] == [
        f"The Elbe é.{space}</s>",
        f"Dresden{space}</s>",
    ]
    trained = labels != -100
    assert np.array_equal(labels[trained], ids[trained])
    assert trained[ids == tokenizer.eos_token_id].all() and (ids == tokenizer.eos_token_id).sum() == 2
    assert ids[-1] == tokenizer.eos_token_id


def test_blank_before_the_answer_is_trained_on(llama: Any) -> None:
    """It is generated after "ASSISTANT:", so it must not count as prompt."""
    example = tokenize_conversation(qa("Q", "the river"), get_template("vicuna_v1.1"), llama)
    first = int(np.flatnonzero(example["labels"] != -100)[0])
    assert llama.convert_ids_to_tokens([example["labels"][first]])[0].startswith("▁")
    assert llama.convert_ids_to_tokens([example["input_ids"][first - 1]]) == [":"]


@pytest.mark.parametrize("name", ["alpaca", "vicuna_v1.1", "llama-2"])
def test_whole_text_is_what_the_tokenizer_itself_makes_of_it(llama: Any, two_turns: Conversation, name: str) -> None:
    template = get_template(name)
    text = template.text(two_turns, llama)
    assert tokenize_conversation(two_turns, template, llama)["input_ids"].tolist() == llama(text)["input_ids"]


@pytest.mark.parametrize("name", ["alpaca", "vicuna_v1.1", "llama-2"])
def test_without_offsets_it_is_the_same_as_the_whole_text(
    slow: Any, two_turns: Conversation, task: Conversation, name: str
) -> None:
    """Segment by segment, sentencepiece must not slip a blank in at the joints."""
    template = get_template(name)
    for conversation in (two_turns, task):
        ids = tokenize_conversation(conversation, template, slow)["input_ids"].tolist()
        assert ids == slow(template.text(conversation, slow))["input_ids"]


@pytest.mark.parametrize("name", ["alpaca", "vicuna_v1.1", "llama-2"])
def test_with_and_without_offsets_agree_on_what_is_trained_on(
    llama: Any, slow: Any, two_turns: Conversation, name: str
) -> None:
    """(The ids differ after special tokens, where sentencepiece itself adds a blank and transformers does
    not.)"""
    fast_answers, slow_answers = (
        answers_of(tokenize_conversation(two_turns, get_template(name), tokenizer), tokenizer)
        for tokenizer in (llama, slow)
    )
    assert [text.strip() for text in fast_answers] == [text.strip() for text in slow_answers]
    single = Conversation(None, two_turns.turns[:2])
    fast_one, slow_one = (tokenize_conversation(single, get_template(name), tokenizer) for tokenizer in (llama, slow))
    assert fast_one["input_ids"].tolist() == slow_one["input_ids"].tolist()
    assert fast_one["labels"].tolist() == slow_one["labels"].tolist()


def test_a_joint_that_a_token_crosses_still_has_all_answer_text(slow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without offsets, an answer whose start would merge with the prompt is tokenised by itself."""
    template = get_template("alpaca")
    conversation = qa("Q", "answer")
    segments = template.segments(conversation, slow)
    merged = [segments[0]._replace(text="the ans"), segments[1]._replace(text="wer</s>")]
    assert slow.tokenize("the answer")[-1] == "▁answer", "one piece across the joint"
    monkeypatch.setattr(template, "segments", lambda conversation, tokenizer: merged)
    example = tokenize_conversation(conversation, template, slow)
    assert [text.strip() for text in answers_of(example, slow)] == ["wer</s>"]


def test_one_beginning_token(llama: Any, slow: Any, chatml: Any) -> None:
    for tokenizer in (llama, slow):
        for name in ("alpaca", "vicuna_v1.1", "llama-2"):
            ids = tokenize_conversation(qa("Q", "A"), get_template(name), tokenizer)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id and (ids == tokenizer.bos_token_id).sum() == 1
    ids = tokenize_conversation(qa("Q", "A"), get_template("alpaca"), chatml)["input_ids"]
    assert chatml.convert_ids_to_tokens(ids[:1].tolist()) == ["B"], "a tokenizer that adds none gets none"


@pytest.mark.parametrize("kind", ["llama", "slow"])
def test_no_second_beginning_token_when_the_text_has_one(request: Any, kind: str) -> None:
    tokenizer = request.getfixturevalue(kind)
    template = get_template("vicuna_v1.1")
    conversation = Conversation("<s>S", qa("Q", "A").turns)
    assert template.text(conversation, tokenizer).startswith("<s>S USER:")
    ids = tokenize_conversation(conversation, template, tokenizer)["input_ids"]
    assert ids[0] == 1 and (ids == 1).sum() == 1


def test_llama2_turns_begin_with_the_beginning_token(llama: Any, two_turns: Conversation) -> None:
    example = tokenize_conversation(two_turns, get_template("llama-2"), llama)
    begins = np.flatnonzero(example["input_ids"] == 1)
    ends = np.flatnonzero(example["input_ids"] == 2)
    assert begins.tolist() == [0, ends[0] + 1] and ends[1] == len(example["input_ids"]) - 1
    assert (example["labels"][begins] == -100).all()


def test_chat_template_is_tokenised_as_by_the_tokenizer(chatml: Any, two_turns: Conversation) -> None:
    example = tokenize_conversation(two_turns, get_template("tokenizer"), chatml)
    own = chatml.apply_chat_template(two_turns.messages(), tokenize=True, return_dict=True)["input_ids"]
    assert example["input_ids"].tolist() == own[:-1], "all but the line end after the last answer"
    assert answers_of(example, chatml) == ["The Elbe é.<|im_end|>", "Dresden<|im_end|>"]


@pytest.mark.parametrize("begin", ["{{ bos_token }}", ""])
def test_chat_template_alone_decides_on_the_beginning_token(
    two_turns: Conversation, sentencepiece_dir: Any, begin: str
) -> None:
    """Neither doubled nor added: generation goes through apply_chat_template, which adds nothing either."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sentencepiece_dir)
    tokenizer.chat_template = begin + (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    ids = tokenize_conversation(two_turns, get_template("tokenizer"), tokenizer)["input_ids"]
    assert (ids == 1).sum() == (1 if begin else 0)
    own: Any = tokenizer.apply_chat_template(two_turns.messages(), tokenize=True, return_dict=True)
    assert ids.tolist() == own["input_ids"]


def test_a_token_belongs_to_the_segment_of_its_first_character(chatml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = get_template("alpaca")
    conversation = qa("Q", "A")
    segments = template.segments(conversation, chatml)
    crossing = chatml.tokenize("river river river")
    assert "Ġriver" in crossing, "one token with its blank"
    cut = [segments[0]._replace(text="The ri"), segments[1]._replace(text="ver river<|im_end|>")]
    monkeypatch.setattr(template, "segments", lambda conversation, tokenizer: cut)
    example = tokenize_conversation(conversation, template, chatml)
    assert answers_of(example, chatml) == [" river<|im_end|>"]


def test_truncation_is_from_the_right_and_counted(llama: Any) -> None:
    template = get_template("alpaca")
    conversations = [qa("Q", "the river " * count) for count in (1, 50, 100)]
    whole = [tokenize_conversation(conversation, template, llama) for conversation in conversations]
    limit = len(whole[0]["input_ids"]) + 20
    report = TokenizationReport(limit)
    cut = list(tokenize_all(conversations, template, llama, limit, report))
    lengths = [len(example["input_ids"]) for example in whole]
    assert (report.examples, report.kept, report.truncated, report.dropped) == (3, 3, 2, 0)
    assert report.tokens_cut == sum(lengths[1:]) - 2 * limit and report.longest == lengths[2]
    assert report.tokens == lengths[0] + 2 * limit
    assert report.targets == sum(count_targets(example["labels"]) for example in cut)
    for example, full in zip(cut, whole, strict=True):
        assert np.array_equal(example["input_ids"], full["input_ids"][:limit])
        assert np.array_equal(example["labels"], full["labels"][:limit])
    alone = tokenize_conversation(conversations[2], template, llama, limit)
    assert np.array_equal(alone["input_ids"], cut[2]["input_ids"])


def test_examples_without_an_answer_left_are_dropped(llama: Any) -> None:
    template = get_template("alpaca")
    conversations = [qa("the river " * 100, "A"), qa("Q", "A")]
    short = len(tokenize_conversation(conversations[1], template, llama)["input_ids"])
    report = TokenizationReport(short)
    (only,) = tokenize_all(conversations, template, llama, short, report)
    assert (report.dropped, report.truncated, report.kept) == (1, 1, 1) and len(only["input_ids"]) == short
    report.sequences = 1
    summary = report.summary()
    assert "1 examples" in summary and f"1 cut at {short} tokens" in summary and "1 of them dropped" in summary


def test_every_answer_lost_names_the_remedy(llama: Any) -> None:
    template = get_template("alpaca")
    conversations = [qa("Q", "A"), qa("a longer question", "A")]
    report = TokenizationReport(20)
    with pytest.raises(ValueError, match="max_length=20 leaves no answer token in any of the 2 examples") as caught:
        list(tokenize_all(conversations, template, llama, 20, report))
    needed = report.shortest_useful
    assert f"raise max_length to {needed}" in str(caught.value)
    assert len(list(tokenize_all(conversations, template, llama, needed, TokenizationReport(needed)))) == 1
    with pytest.raises(ValueError, match="leaves no answer"):
        list(tokenize_all(conversations, template, llama, needed - 1, TokenizationReport(needed - 1)))
    with pytest.raises(ValueError, match="at least 2"):
        list(tokenize_all(conversations, template, llama, 1, TokenizationReport(1)))


def test_batches_do_not_matter(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = get_template("vicuna_v1.1")
    conversations = [qa(f"Question {k}", f"{k} rivers") for k in range(7)]
    monkeypatch.setattr("salient_ds.data.tokenize._BATCH", 3)
    batched = tokenize_all(conversations, template, llama, 500, TokenizationReport(500))
    for example, conversation in zip(batched, conversations, strict=True):
        assert np.array_equal(example["labels"], tokenize_conversation(conversation, template, llama)["labels"])


def test_special_tokens_in_the_data_are_counted(llama: Any) -> None:
    report = TokenizationReport(500)
    list(tokenize_all([qa("Q", "A</s> B"), qa("Q", "A")], get_template("alpaca"), llama, 500, report))
    assert report.control_tokens == 1 and "1 spell a special token" in report.summary()


def test_error_names_the_row(chatml: Any) -> None:
    chatml.chat_template = "{% for m in messages %}{{ m['content'] | upper + '<|im_end|>' }}{% endfor %}"
    conversation = dataclasses.replace(qa("q", "a"), source=("train.json", 17))
    with pytest.raises(ValueError, match=r"train\.json, line 17"):
        list(tokenize_all([conversation], get_template("tokenizer"), chatml, 50, TokenizationReport(50)))


def test_first_label_is_no_target() -> None:
    assert count_targets(np.array([5, 6, -100, 7])) == 2
