"""From examples to tensors: pairs, windows, targets, batches, and the data set that holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from salient_ds.data.tasks.base import Example
from salient_ds.data.tasks.collate import TaskCollator
from salient_ds.data.tasks.dataset import TaskDataset, load_task
from salient_ds.data.tasks.spans import Answer, answer_tokens, null_position
from salient_ds.data.tasks.table import task_of
from tests.unit.tasks.task_samples import ELBE, TOKENIZERS, question

PAIRS = task_of({"kind": "classification", "columns": ["a", "b"], "labels": ["no", "yes"]})
FAMILIES = list(TOKENIZERS)


def dataset(task: Any, examples: list[Example], family: str, max_length: int, training: bool = False) -> TaskDataset:
    return TaskDataset(task, examples, task.encode(examples, TOKENIZERS[family], max_length, training))


@pytest.mark.parametrize("family", FAMILIES)
def test_pairs_are_encoded_by_the_tokenizer(family: str, write: Callable[..., Path]) -> None:
    tokenizer = TOKENIZERS[family]
    path = write({"a": "The river", "b": "is long.", "label": "yes"}, {"a": "Hamburg", "b": "Sea", "label": 0})
    found, report = load_task(PAIRS, path, tokenizer, 64, training=True)
    assert len(found) == 2 and found[1]["labels"] == 0
    assert found[0] == {**tokenizer("The river", "is long."), "labels": 1}
    assert ("token_type_ids" in found.columns) == (family == "wordpiece")
    assert found.num_targets.tolist() == [1, 1] and found.labelled
    assert report.notes("train") == ["train: no 1, yes 1"]


@pytest.mark.parametrize("family", FAMILIES)
def test_long_pairs_lose_the_end_of_the_longer_text(family: str) -> None:
    tokenizer = TOKENIZERS[family]
    examples = [Example(0, ("The river", ELBE), 1), Example(1, ("The river", "is long."), 0)]
    found = dataset(PAIRS, examples, family, 24, True)
    assert len(found[0]["input_ids"]) == 24 and found.cut == 1
    assert found[0]["input_ids"] == tokenizer("The river", ELBE, truncation="only_second", max_length=24)["input_ids"]


def test_an_input_that_just_fits_is_not_cut() -> None:
    length = len(TOKENIZERS["wordpiece"]("The river", ELBE)["input_ids"])
    examples = [Example(0, ("The river", ELBE), 1)]
    assert [dataset(PAIRS, examples, "wordpiece", length - less).cut for less in (0, 1)] == [0, 1]


def test_numbers_stay_numbers() -> None:
    task = task_of({"kind": "regression", "columns": ["text"]})
    found = dataset(task, [Example(0, ("a",), 3.0), Example(1, ("b c",), 0.1)], "wordpiece", 16)
    assert [found[0]["labels"], found[1]["labels"]] == [3.0, 0.1] and isinstance(found[0]["labels"], float)
    batch = TaskCollator(0)([found[0], found[1]])
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == pytest.approx([3.0, 0.1])


@pytest.mark.parametrize("family", ["byte_level", "end_token"])
def test_summaries_have_a_source_and_a_target(family: str, write: Callable[..., Path]) -> None:
    tokenizer = TOKENIZERS[family]
    task = task_of({"kind": "summarisation", "prefix": "summarize: ", "max_target_length": 8})
    path = write({"document": ELBE, "summary": ELBE}, {"document": "The Elbe.", "summary": "A river."})
    found, report = load_task(task, path, tokenizer, 20, training=True)
    first, second = found[0], found[1]
    assert (len(first["input_ids"]), len(first["labels"])) == (20, 8)
    assert second["input_ids"] == tokenizer("summarize: The Elbe.")["input_ids"]
    assert second["labels"] == tokenizer("A river.")["input_ids"]
    ends = {first["input_ids"][-1], first["labels"][-1], second["labels"][-1]}
    assert ends == {tokenizer.eos_token_id}
    assert found.num_targets.tolist() == [8, len(second["labels"])]
    assert report.notes("train") == ["train: 1 of 2 examples are longer than data.max_length=20 tokens and were cut"]


def windows(family: str, room: int, stride: int, *answers: str) -> tuple[TaskDataset, list[str]]:
    """The windows of a question about the Elbe, and the text that each one labels ("" for no answer)."""
    task = task_of({"like": "squad/v2", "stride": stride})
    example = Example("q", ("How long?", ELBE), tuple(Answer(a, ELBE.index(a)) for a in answers))
    tokenizer = TOKENIZERS[family]
    questions = len(tokenizer("How long?", add_special_tokens=False)["input_ids"])
    length = questions + tokenizer.num_special_tokens_to_add(pair=True) + room
    found = dataset(task, [example], family, length)
    labelled = []
    for item, features in zip(found, (found._features(k, 0) for k in range(len(found))), strict=True):
        null = null_position(item["input_ids"], tokenizer)
        start, end = item["start_positions"], item["end_positions"]
        assert (start == null) == (end == null) and start <= end
        inside = features.offsets
        labelled.append("" if start == null else ELBE[inside[start][0] : inside[end][1]].strip())
    return found, labelled


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FAMILIES), st.integers(2, 60), st.data())
def test_windows_cover_the_context_and_label_answers_where_they_are_whole(family: str, room: int, data: Any) -> None:
    stride = data.draw(st.integers(0, room - 1), "stride")
    words = [(m, ELBE[m:].split(" ")[0]) for m in range(len(ELBE)) if m == 0 or ELBE[m - 1] == " "]
    first = data.draw(st.integers(0, len(words) - 1), "first word")
    start = words[first][0]
    answer = " ".join(word for _, word in words[first : first + data.draw(st.integers(1, 4), "words")])
    task = task_of({"like": "squad/v2", "stride": stride})
    tokenizer = TOKENIZERS[family]
    example = Example("q", ("How long?", ELBE), (Answer(answer, start),))
    questions = len(tokenizer("How long?", add_special_tokens=False)["input_ids"])
    length = questions + tokenizer.num_special_tokens_to_add(pair=True) + room
    features = list(task.encode([example], tokenizer, length, False))
    covered, before = np.zeros(len(ELBE), bool), -1
    for item in features:
        inside = [span for span in item.offsets if span[1] > span[0]]
        assert len(item.values["input_ids"]) <= length and inside
        assert inside[0][0] >= before  # equal: bytes of one character are several tokens
        before = inside[0][0]
        covered[inside[0][0] : inside[-1][1]] = True
        null = null_position(item.values["input_ids"], tokenizer)
        first_token, last_token = item.values["start_positions"], item.values["end_positions"]
        whole = inside[0][0] <= start and start + len(answer) <= inside[-1][1]
        assert (first_token != null) == whole
        if whole:
            text = ELBE[item.offsets[first_token][0] : item.offsets[last_token][1]]
            assert answer in text and len(text.strip()) <= len(answer) + 1  # a token may hold the space before a word
    assert all(covered[place] or ELBE[place] == " " for place in range(len(ELBE)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_short_context_is_one_window(family: str) -> None:
    found, labelled = windows(family, 400, 100, "about 1,094 kilometres")
    assert len(found) == 1 and labelled == ["about 1,094 kilometres"]
    found, labelled = windows(family, 400, 100)
    assert labelled == [""]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_read_back_from_perfect_logits(family: str, write: Callable[..., Path]) -> None:
    task = task_of({"like": "squad/v2", "stride": 6})
    rows = [
        question("a", "Where does the Elbe rise?", "Giant Mountains", "Giant Mountains of the Czech Republic"),
        question("b", " How long is the river?", "1,094"),
        question("c", "Who built it?"),
    ]
    found, report = load_task(task, write(*rows), TOKENIZERS[family], 44, training=False)
    assert report.notes("eval") == [f"eval: 3 examples in {len(found)} windows of 44 tokens"] and len(found) >= 6
    outputs: dict[str, list[np.ndarray]] = {"start_logits": [], "end_logits": []}
    for item in found:
        answered = item["start_positions"] != null_position(item["input_ids"], TOKENIZERS[family])
        for name, place in (("start_logits", "start_positions"), ("end_logits", "end_positions")):
            row = np.zeros(len(item["input_ids"]) + 4)  # a batch is padded
            row[item[place]] = 9.0 if answered else 5.0
            outputs[name].append(row)
    predictions = found.decode(outputs, TOKENIZERS[family])
    assert [p.value for p in predictions] == ["Giant Mountains", "1,094", ""]
    scores = found.score(predictions)
    assert (scores["f1"], scores["exact_match"], scores["no_answer_f1"]) == (100.0, 100.0, 100.0)
    with pytest.raises(ValueError, match=rf"1 rows of 'end_logits' for {len(found)} items: each item needs one"):
        found.decode({**outputs, "end_logits": outputs["end_logits"][:1]}, TOKENIZERS[family])


def test_training_keeps_neither_texts_nor_offsets(write: Callable[..., Path]) -> None:
    path = write(question("q", "How long?", "Dresden"))
    task = task_of({"like": "squad/v1", "stride": 4})
    found, _ = load_task(task, path, TOKENIZERS["wordpiece"], 30, training=True)
    assert found.labelled and len(found) > 1
    assert all(found._features(k, 0).offsets == [] for k in range(len(found)))
    for part in (found, found.select([0])):
        assert [(e.id, e.texts, e.target) for e in part.examples] == [("q", (), None)]
        with pytest.raises(ValueError, match="was loaded for training, without texts"):
            part.decode({}, TOKENIZERS["wordpiece"])
        with pytest.raises(ValueError, match="was loaded for training, without texts"):
            part.score([])
    same, _ = load_task(task, path, TOKENIZERS["wordpiece"], 30, training=False)
    assert same.fingerprint() == found.fingerprint()


def test_a_question_that_leaves_no_room_is_named() -> None:
    example = Example("q7", ("How long is the river? " * 4, ELBE), ())
    with pytest.raises(ValueError, match=r"question q7 has \d+ tokens, so that data.max_length=30 leaves 3 for its"):
        dataset(task_of({"like": "squad/v2", "stride": 4}), [example], "wordpiece", 30)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    task = task_of("squad/v1")
    with pytest.raises(ValueError, match="question answering needs a fast tokenizer.*Slow is not one"):
        next(task.encode([Example("q", ("a", "b"), ())], Slow(), 400, True))  # type: ignore[arg-type]


def test_answer_tokens_by_hand() -> None:
    inside = [(0, 0), (4, 7), (7, 9), (10, 12), (0, 0)]
    assert answer_tokens(inside, Answer("abc", 4)) == (1, 1)
    assert answer_tokens(inside, Answer("cd", 6)) == (1, 2)
    assert answer_tokens(inside, Answer("x" * 8, 4)) == (1, 3)
    assert answer_tokens(inside, Answer("x" * 9, 4)) == answer_tokens(inside, Answer("x", 3)) == (None, None)
    assert answer_tokens([(0, 0)], Answer("x", 0)) == (None, None)


def test_classes_and_summaries_are_decoded() -> None:
    examples = [Example("a", ("x", "y"), 1), Example("b", ("x", "y"), 0)]
    found = dataset(PAIRS, examples, "wordpiece", 16)
    predictions = found.decode({"logits": [[0.0, 2.0], [1.0, 1.0]]}, TOKENIZERS["wordpiece"])
    assert [(p.id, p.value) for p in predictions] == [("a", 1), ("b", 0)]
    assert predictions[0].score == pytest.approx(1 / (1 + np.exp(-2.0))) and predictions[1].score == 0.5
    assert found.score(predictions) == {"accuracy": 1.0}
    tokenizer = TOKENIZERS["byte_level"]
    task = task_of({"kind": "summarisation"})
    found = dataset(task, [Example("a", ("x",), "The river.")], "byte_level", 16)
    row = torch.tensor([2, *tokenizer("The river.")["input_ids"], 1, 1, -100])
    (prediction,) = found.decode({"generated": [row]}, tokenizer)
    assert prediction.value == "The river." and found.score([prediction])["rougeL"] == 100.0


def test_a_regression_head_has_one_output() -> None:
    task = task_of({"kind": "regression", "columns": ["text"]})
    found = dataset(task, [Example(0, ("a",), 3.0)], "wordpiece", 16)
    assert [found.decode({"logits": logits}, TOKENIZERS["wordpiece"])[0].value for logits in ([[2.5]], [2.5])] == [
        2.5
    ] * 2
    with pytest.raises(ValueError, match="example 0: a regression head has one output, this one has 2"):
        found.decode({"logits": [[1.0, 2.0]]}, TOKENIZERS["wordpiece"])


def test_every_example_is_scored_exactly_once() -> None:
    examples = [Example("a", ("x", "y"), 1), Example("b", ("x", "y"), 0)]
    found = dataset(PAIRS, examples, "wordpiece", 16)
    predictions = found.decode({"logits": [[0.0, 2.0], [1.0, 0.0]]}, TOKENIZERS["wordpiece"])
    for wrong in (predictions[:1], predictions[::-1], [*predictions, predictions[1]]):
        with pytest.raises(ValueError, match="each example needs one"):
            found.score(wrong)
    unlabelled = dataset(PAIRS, [Example("a", ("x", "y"))], "wordpiece", 16)
    assert not unlabelled.labelled and "labels" not in unlabelled.columns
    with pytest.raises(ValueError, match=r"1 of 1 examples have no label \(first: a\): there is no score"):
        unlabelled.score(predictions[:1])


def test_batches_are_padded_on_the_side_that_was_asked_for() -> None:
    items = [
        {"input_ids": [5, 6, 7], "attention_mask": [1, 1, 1], "token_type_ids": [0, 1, 1], "labels": [8, 9]},
        {"input_ids": [5], "attention_mask": [1], "token_type_ids": [0], "labels": [8]},
    ]
    right = TaskCollator(99, pad_to_multiple_of=4)(items)
    assert right["input_ids"].tolist() == [[5, 6, 7, 99], [5, 99, 99, 99]]
    assert right["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]
    assert right["token_type_ids"].tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    left = TaskCollator(99, "left", 1)(items)
    assert left["input_ids"].tolist() == [[5, 6, 7], [99, 99, 5]] and left["attention_mask"].tolist()[1] == [0, 0, 1]
    for batch in (right, left):  # targets begin at the left in any case
        assert batch["labels"][:, :2].tolist() == [[8, 9], [8, -100]] and (batch["labels"][:, 2:] == -100).all()
    for wrong in ({"pad_to_multiple_of": 0}, {"padding_side": "middle"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            TaskCollator(0, **wrong)  # type: ignore[arg-type]


def test_selecting_and_splitting_keeps_windows_with_their_example() -> None:
    task = task_of({"like": "squad/v2", "stride": 4})
    examples = [Example(k, (f"How long {k}?", ELBE if k % 2 else "The Elbe."), ()) for k in range(10)]
    whole = dataset(task, examples, "wordpiece", 40)
    chosen = whole.select([3, 0])
    assert [e.id for e in chosen.examples] == [3, 0] and chosen.example_of.tolist() == [0] * (len(chosen) - 1) + [1]
    own = [item for item, number in zip(whole, whole.example_of, strict=True) if number == 3]
    assert [chosen[k] for k in range(len(chosen) - 1)] == own and len(own) > 1
    train, held_out = whole.split(0.3, seed=1)
    assert (len(train.examples), len(held_out.examples)) == (7, 3)
    assert sorted(e.id for part in (train, held_out) for e in part.examples) == list(range(10))
    assert (train.training, held_out.training) == (True, False)
    assert whole.split(0.3, 1)[1].fingerprint() == held_out.fingerprint() != whole.split(3, 2)[1].fingerprint()
    for size in (0.01, 10):
        with pytest.raises(ValueError, match="leave one on each side"):
            whole.split(size, 0)


def test_fingerprints_tell_labels_and_tokens_apart() -> None:
    cases = [
        [Example(0, ("The river", "is long."), 1)], [Example(0, ("The river", "is long."), 0)],
        [Example(0, ("The river is", "long."), 1)], [Example(0, ("The river", "is long."))],
    ]  # fmt: skip
    assert len({dataset(PAIRS, examples, "wordpiece", 16).fingerprint() for examples in cases}) == 4
    same = dataset(PAIRS, cases[0], "wordpiece", 99)
    assert same.fingerprint() == dataset(PAIRS, cases[0], "wordpiece", 16).fingerprint()


def test_labelled_and_unlabelled_rows_do_not_mix() -> None:
    with pytest.raises(ValueError, match=r"some rows have a label and some have none \(labels\): split them"):
        dataset(PAIRS, [Example(0, ("a", "b"), 1), Example(1, ("a", "b"))], "wordpiece", 16)


def test_items_are_counted_from_both_ends() -> None:
    found = dataset(PAIRS, [Example(k, ("a", "b"), k) for k in (0, 1)], "wordpiece", 16)
    assert found[-1] == found[1] and found.lengths.tolist() == [len(found[0]["input_ids"])] * 2
    with pytest.raises(IndexError, match="item 2 of 2"):
        found[2]
