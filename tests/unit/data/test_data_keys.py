"""Keys that mean something for training: each is honoured, or its row is refused by name; none is dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from salient_ds.data.conversation import DataError
from salient_ds.data.formats import check_file, read_data, read_rows

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}


def chat(*turns: dict[str, Any], **columns: Any) -> dict[str, Any]:
    return {"messages": list(turns), **columns}


def user(text: str = "U", **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def assistant(text: Any = "A", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str = "rain", **more: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **more}


def write(folder: Path, rows: list[dict[str, Any]], kind: str) -> Path:
    """As JSONL, as a JSON list, or as Parquet, where all rows have the same columns."""
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


each_kind = pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])


@each_kind
def test_meaning_is_read_the_same_from_json_and_parquet(tmp_path: Path, kind: str) -> None:
    rows = [
        chat(user(), assistant(None, tool_calls=[CALL]), tool(), assistant("It rains."), tools=[TOOL], system="S"),
        chat(user(), assistant(weight=0), user("V"), assistant("B", weight=1, reasoning_content="think")),
        chat(user(), assistant()),
    ]
    first, second, plain = read_rows(write(tmp_path, rows, kind))
    assert first.system == "S" and first.tools == [TOOL]
    assert [turn.role for turn in first.turns] == ["user", "assistant", "tool", "assistant"]
    assert first.messages()[2] == assistant("", tool_calls=[CALL])
    assert [turn.train for turn in second.turns if turn.role == "assistant"] == [False, True]
    assert second.messages()[-1] == assistant("B", reasoning_content="think")
    assert plain.tools is None and plain.system is None and all(turn.extra is None for turn in plain.turns)


@pytest.mark.parametrize("empty", [None, "", [], {}])
@pytest.mark.parametrize("key", ["system", "tools", "functions", "images", "videos", "audio", "chat_template_kwargs"])
def test_empty_values_mean_absent(tmp_path: Path, key: str, empty: Any) -> None:
    (found,) = read_rows(write(tmp_path, [chat(user(), assistant(), **{key: empty})], "jsonl"))
    assert (found.system, found.tools, found.template_kwargs) == (None, None, None)


@pytest.mark.parametrize("key", ["weight", "train", "loss", "tool_calls", "name", "reasoning_content", "thinking"])
def test_empty_values_of_turns_mean_absent(tmp_path: Path, key: str) -> None:
    for empty in (None, "", []):
        (found,) = read_rows(write(tmp_path, [chat(user(), assistant(**{key: empty}))], "jsonl"))
        assert found.turns[1].train and found.turns[1].extra is None


def test_values_as_json_text(tmp_path: Path) -> None:
    row = chat(user(), assistant(), tools=json.dumps([TOOL]), chat_template_kwargs='{"enable_thinking": false}')
    (found,) = read_rows(write(tmp_path, [row], "jsonl"))
    assert found.tools == [TOOL] and found.template_kwargs == {"enable_thinking": False}
    (found,) = read_rows(write(tmp_path, [chat(user(), assistant(), functions=[TOOL["function"]])], "jsonl"))
    assert found.tools == [TOOL]


def test_alpaca_history_comes_first(tmp_path: Path) -> None:
    row = ALPACA | {"history": [["What is 2 + 2?", "4"], ["And 5?", "9"]], "system": "S"}
    (found,) = read_rows(write(tmp_path, [row], "jsonl"))
    assert [turn.text for turn in found.turns] == ["What is 2 + 2?", "4", "And 5?", "9", "Add.\n\n1 2", "3"]
    assert found.system == "S" and found.instruction is None


def test_sharegpt_function_calls(tmp_path: Path) -> None:
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": json.dumps({"name": "weather", "arguments": {"city": "Ulm"}})},
            {"from": "observation", "value": "rain"},
            {"from": "gpt", "value": "It rains."},
        ],
        "tools": json.dumps([TOOL]),
    }
    (found,) = read_rows(write(tmp_path, [row], "jsonl"))
    assert found.messages()[1:3] == [assistant("", tool_calls=[CALL]), tool()]


@pytest.mark.parametrize(
    ("row", "essentials"),
    [
        (chat(user(), assistant(), images=["a.png"]), ('"images" holds 1 items', "text alone")),
        (ALPACA | {"audio": {"path": "a.wav"}}, ('"audio" holds a value',)),
        (chat(user([{"type": "image_url", "image_url": "x"}]), assistant()), ("part of type 'image_url'",)),  # type: ignore[arg-type]
        (chat(user(), assistant(), tools="{"), ('"tools" is text that is not JSON',)),
        (chat(user(), assistant(), tools={"name": "x"}), ('"tools" is dict, expected a list',)),
        (chat(user(), assistant(), tools=["x"]), ("a tool is str",)),
        (chat(user(), assistant(), tools=[TOOL], functions=[TOOL]), ('"functions" are both there',)),
        (chat(user(), assistant(weight=0.5)), ('messages[2]["weight"] is 0.5', "nothing between")),
        (chat(user(), assistant(weight=1, train=False)), ("marked twice, differently: weight=1, train=False",)),
        (chat(user(train=True), assistant()), ('messages[1]["train"] asks to train on a turn that is no answer',)),
        (chat(user(), assistant(loss=False)), ("no answer of messages is trained on",)),
        (chat(user(tool_calls=[CALL]), assistant()), ('messages[1] holds "tool_calls", which only an answer',)),
        (chat(user(), assistant(reasoning_content=["x"])), ('messages[2]["reasoning_content"] is list',)),
        (chat(user(), tool(), assistant()), ("must follow an answer with tool_calls",)),
        (chat(user(), assistant(None, tool_calls=[CALL])) | {"history": [["a", "b"]]}, ('"history" is there beside',)),
        (chat({"role": "system", "content": "S"}, user(), assistant(), system="T"), ("they differ: keep one",)),
        (ALPACA | {"history": ["x"]}, ('"history"[1] is text, expected a pair',)),
        (ALPACA | {"history": [["", "x"]]}, ('"history"[1] holds an empty',)),
        (ALPACA | {"system": 3}, ('"system" is a number',)),
        (chat(user(), assistant(), chat_template_kwargs=[1]), ('"chat_template_kwargs" is list',)),
        ({"conversations": [{"from": "human", "value": "x"}, {"from": "function_call", "value": "x"}]},
         ("a function_call that is not JSON",)),
    ],
)  # fmt: skip
def test_refused_by_name(tmp_path: Path, row: dict[str, Any], essentials: tuple[str, ...]) -> None:
    with pytest.raises(DataError) as caught:
        read_rows(write(tmp_path, [row], "jsonl"))
    for text in essentials:
        assert text in str(caught.value)


def test_the_same_system_message_twice_is_one(tmp_path: Path) -> None:
    row = chat({"role": "system", "content": "S"}, user(), assistant(), system="S")
    (found,) = read_rows(write(tmp_path, [row], "jsonl"))
    assert found.system == "S"


def test_content_parts_of_text_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (found,) = read_rows(write(tmp_path, [chat(user(parts), assistant(parts))], "jsonl"))  # type: ignore[arg-type]
    assert [turn.text for turn in found.turns] == ["ab", "ab"]


def test_other_keys_are_counted(tmp_path: Path) -> None:
    rows = [chat(user(), assistant(), id=1, source="web"), chat(user(mood="glad"), assistant(), id=2, source=None)]
    _, summary = read_data(write(tmp_path, rows, "jsonl"))
    assert summary.ignored_keys == {"id": 2, "source": 1, "messages[].mood": 1}
    (note,) = summary.notes("train")
    assert note == "train: keys of rows that nothing reads: id (2), source (1), messages[].mood (1)"


def test_bad_rows_are_left_out_by_kind(tmp_path: Path) -> None:
    """ShareGPT files as they are: an answer first, a user turn last, an empty answer, an image."""
    good = {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}
    first = {"conversations": [{"from": "gpt", "value": "hello"}, *good["conversations"]]}
    last = {"conversations": [*good["conversations"], {"from": "human", "value": "u"}]}
    empty = {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": " "}]}
    path = write(tmp_path, [good, first, last, empty, good | {"images": ["x"]}, good], "jsonl")
    path.write_text(path.read_text() + "{broken\n")
    rows, summary = read_data(path, bad_rows="skip")
    assert len(rows) == summary.rows == 2
    kinds = {"role order": 2, "empty answer": 1, "images": 1, "invalid JSON": 1}
    assert (summary.skipped, summary.skipped_kinds) == (5, kinds)
    assert check_file(path, bad_rows="skip") == summary
    assert "train: 5 rows are left out (2 x role order" in summary.notes("train")[0]
    with pytest.raises(DataError, match=r"5 problems \(2 x role order, 1 x empty answer"):
        read_data(path)
    with pytest.raises(DataError, match="all 1 rows are left out"):
        read_rows(write(tmp_path, [first], "json"), bad_rows="skip")


def test_gzip_is_read(tmp_path: Path) -> None:
    import gzip

    for name, text in (("a.jsonl.gz", json.dumps(ALPACA) + "\n"), ("b.json.gz", json.dumps([ALPACA]))):
        with gzip.open(tmp_path / name, "wt") as file:
            file.write(text)
        assert check_file(tmp_path / name).rows == 1
