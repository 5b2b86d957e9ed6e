"""Prompt and completion, preference pairs, and plain text: what is trained on, what is refused, and that no token is
lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from salient_ds.data.conversation import IGNORED, Conversation, DataError
from salient_ds.data.dataset import InstructionDataset, build_dataset
from salient_ds.data.formats import format_of, read_rows
from salient_ds.data.rendering import render_file
from salient_ds.data.templates import get_template
from salient_ds.data.token_report import TokenizationReport

Write = Callable[..., Path]
USER, BOT = {"role": "user", "content": "Name a river."}, {"role": "assistant", "content": "The Elbe."}
SECOND = {"role": "user", "content": "And a city?"}
HUMAN, GPT = {"from": "human", "value": "Name a river."}, {"from": "gpt", "value": "The Elbe."}


def read(write: Write, row: dict[str, Any], fmt: str = "auto") -> Conversation:
    (found,) = read_rows(write("a.jsonl", [row]), fmt)
    return found


def error_of(write: Write, row: dict[str, Any], fmt: str = "auto") -> str:
    with pytest.raises(DataError) as caught:
        read(write, row, fmt)
    return str(caught.value)


def shape(found: Conversation) -> list[tuple[str, str, bool]]:
    return [(turn.role, turn.text, turn.train) for turn in found.turns]


ASKED = [("user", "Name a river.", True), ("assistant", "The Elbe.", True)]


@pytest.mark.parametrize(
    ("row", "fmt"),
    [
        ({"prompt": "Name a river.", "completion": "The Elbe."}, "auto"),
        ({"prompt": [USER], "completion": [BOT]}, "auto"),
        ({"prompt": [USER], "completion": "The Elbe."}, "auto"),
        ({"prompt": "Name a river.", "completion": BOT}, "auto"),
        ({"prompt": "Name a river.", "chosen": "The Elbe.", "rejected": "No."}, "chosen"),
        ({"prompt": [USER], "chosen": [BOT], "rejected": []}, "chosen"),
        ({"prompt": "Name a river.", "chosen": [USER, BOT], "rejected": [USER, BOT]}, "chosen"),
        ({"chosen": [USER, BOT], "rejected": [USER, BOT]}, "chosen"),
        ({"instruction": "Name a river.", "chosen": "The Elbe.", "rejected": "No."}, "chosen"),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": GPT}, "chosen"),
    ],
)
def test_pairs_in_every_way_that_they_are_written(write: Write, row: dict[str, Any], fmt: str) -> None:
    assert shape(read(write, row, fmt)) == ASKED


@pytest.mark.parametrize(
    ("row", "fmt"),
    [
        ({"prompt": [USER, BOT, SECOND], "completion": [{"role": "assistant", "content": "Dresden."}]}, "auto"),
        ({"prompt": [USER, BOT, SECOND], "chosen": "Dresden.", "rejected": "No."}, "chosen"),
        ({"chosen": [USER, BOT, SECOND, {"role": "assistant", "content": "Dresden."}], "rejected": []}, "chosen"),
    ],
)
def test_answers_in_the_prompt_are_context(write: Write, row: dict[str, Any], fmt: str) -> None:
    found = shape(read(write, row, fmt))
    assert [train for role, _, train in found if role == "assistant"] == [False, True]


def test_a_system_message_comes_along(write: Write) -> None:
    system = {"role": "system", "content": "Be brief."}
    assert read(write, {"prompt": [system, USER], "completion": [BOT]}).system == "Be brief."
    assert read(write, {"system": "Be brief.", "prompt": "x", "completion": "y"}).system == "Be brief."
    assert "differ" in error_of(write, {"system": "Be long.", "prompt": [system, USER], "completion": [BOT]})


def test_a_preference_pair_is_refused_unless_it_is_asked_for(write: Write) -> None:
    for row in (
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": [USER, BOT], "rejected": [USER, BOT]},
        {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT},
    ):
        assert 'preference pair ("chosen" and "rejected")' in (said := error_of(write, row))
        assert 'set data.format to "chosen" to train on the chosen answers alone' in said
    both = {"messages": [USER, BOT], "chosen": [USER, BOT], "rejected": []}  # a conversation with scores beside it
    assert shape(read(write, both)) == ASKED


@pytest.mark.parametrize(
    ("row", "fmt", "said"),
    [
        ({"prompt": "a"}, "prompt_completion", 'no "completion"'),
        ({"prompt": " ", "completion": "b"}, "auto", "the prompt is empty"),
        ({"prompt": "a", "completion": " "}, "auto", 'empty answer: "completion"'),
        ({"prompt": 3, "completion": "b"}, "auto", '"prompt" is a number'),
        ({"prompt": [USER], "completion": [BOT, SECOND]}, "auto", r"must end with an assistant turn"),
        ({"prompt": [], "completion": [USER, BOT]}, "auto", "has no turn before it"),
        ({"prompt": "a", "completion": "b", "history": [["c", "d"]]}, "auto", "into the prompt"),
        ({"prompt": [USER], "completion": [{**BOT, "train": False}]}, "auto", "nothing|no answer"),
        ({"chosen": "a", "rejected": "b"}, "chosen", 'no "prompt" before it'),
        ({"prompt": "a", "rejected": "b"}, "chosen", 'no "chosen"'),
        ({"text": " "}, "auto", '"text" holds nothing'),
        ({"text": "a", "system": "b"}, "auto", '"system" is there beside "text"'),
        ({"text": "a", "tools": [{"name": "x"}]}, "auto", '"tools" is there beside "text"'),
        ({"text": 5}, "auto", '"text" is a number'),
        ({"text": "a", "images": ["b"]}, "auto", "text alone"),
        ({"body": "a"}, "text", 'no "text"'),
    ],
)
def test_rows_that_cannot_be_trained_on_are_refused(write: Write, row: dict[str, Any], fmt: str, said: str) -> None:
    import re

    assert re.search(said, error_of(write, row, fmt))


def test_formats_are_found_by_their_keys(write: Write) -> None:
    alpaca_text = {"instruction": "a", "output": "b", "text": "whole"}  # as the published file has it
    rows = {"prompt_completion": {"prompt": "a", "completion": "b"}, "text": {"text": "a"}, "alpaca": alpaca_text}
    for name, row in rows.items():
        assert format_of(write("a.jsonl", [row])) == name
    assert format_of(write("a.jsonl", [{"a": 1}])) is None and format_of("missing", "text") == "text"


def test_without_a_template_texts_stand_as_they_are(write: Write, llama: Any) -> None:
    row = read(write, {"prompt": "2 + 3 =", "completion": " 5\n"})
    template = get_template("none")
    assert template.text(row, llama) == "2 + 3 = 5\n</s>"
    dataset, _ = build_dataset([row], template, llama, 64)
    ids, labels = dataset[0]["input_ids"], dataset[0]["labels"]
    assert ids[0] == llama.bos_token_id and ids[-1] == labels[-1] == llama.eos_token_id
    assert llama.decode(labels[labels != IGNORED]).strip() == "5\n</s>"


TEXT = "A river describes the cheese, appropriately and in one line. " * 6


def texts(write: Write, *values: str) -> list[Conversation]:
    return read_rows(write("a.jsonl", [{"text": value} for value in values]))


@pytest.mark.parametrize("name", ["alpaca", "tokenizer", "none"])
@pytest.mark.parametrize("size", [2, 7, 16, 4096])
def test_every_token_of_a_text_is_a_target_once(write: Write, llama: Any, name: str, size: int) -> None:
    wanted = [*llama(TEXT)["input_ids"], llama.eos_token_id]
    assert wanted[0] == llama.bos_token_id
    dataset, report = build_dataset(texts(write, TEXT), get_template(name), llama, size)
    targets = [int(token) for row in dataset for token in row["labels"][1:] if token != IGNORED]
    assert targets == wanted[1:] and max(dataset.lengths) <= size
    assert all((row["labels"] == row["input_ids"])[1:].all() for row in dataset)
    assert (report.documents, report.blocks, report.truncated, report.dropped) == (1, len(dataset), 0, 0)
    assert f"1 texts became {len(dataset)} blocks" in report.summary() and report.targets == len(wanted) - 1


def test_packed_texts_lose_nothing_and_a_tokenizer_without_offsets_does_the_same(
    write: Write, llama: Any, slow: Any
) -> None:
    rows = texts(write, TEXT, "A city.", TEXT[:90])
    plain = build_dataset(rows, get_template("alpaca"), llama, 32)[0]
    packed = build_dataset(rows, get_template("alpaca"), llama, 32, packing=True)[0]
    assert packed.num_targets.sum() == plain.num_targets.sum() and len(packed) < len(plain)
    assert build_dataset(rows, get_template("alpaca"), slow, 32)[0].num_targets.sum() == plain.num_targets.sum()


def test_text_and_chat_have_the_same_columns(write: Write, chatml: Any) -> None:
    chat = read_rows(write("b.jsonl", [{"messages": [USER, BOT]}]))
    for template in ("tokenizer", "chatml"):
        dataset, report = build_dataset([*texts(write, TEXT), *chat], get_template(template), chatml, 24)
        assert dataset.columns == ("input_ids", "labels") and report.documents == 1
        assert (np.asarray(dataset[-1]["labels"]) == IGNORED).any() and isinstance(dataset, InstructionDataset)


def test_plain_text_needs_an_end_token(write: Write, chatml: Any) -> None:
    chatml.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        build_dataset(texts(write, TEXT), get_template("alpaca"), chatml, 24)


def test_rendering_counts_texts(write: Write, chatml: Any) -> None:
    found = render_file(str(write("a.jsonl", [{"text": "a"}, {"text": "b"}])), "auto", "error", "error",
                        get_template("tokenizer"), chatml)  # fmt: skip
    assert found.examples == 2 and found.summary is not None and found.summary.format == "text"
    report = TokenizationReport(8)
    assert "blocks" not in report.summary()
