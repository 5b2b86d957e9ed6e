"""Reading and validating: every format, every error message's essentials."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salient_ds.data.formats import (
    Conversation,
    DataError,
    Turn,
    check_file,
    count_rows,
    detect_format,
    is_local,
    read_rows,
)

Write = Callable[..., Path]
ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = {
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
}
SHAREGPT = {"conversations": [{"from": "human", "value": "U"}, {"from": "gpt", "value": "A"}]}


def error_of(path: str | Path, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, **options)
    return str(caught.value)


def turns(*pairs: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in pairs]}


@pytest.mark.parametrize(("row", "fmt"), [(ALPACA, "alpaca"), (CHAT, "messages"), (SHAREGPT, "sharegpt")])
def test_detects_formats(row: dict[str, Any], fmt: str) -> None:
    assert detect_format(row) == fmt


@pytest.mark.parametrize("name", ["list", "pretty", "lines"])
@pytest.mark.parametrize("row", [ALPACA, CHAT, SHAREGPT])
def test_reads_list_and_lines_alike(write: Write, row: dict[str, Any], name: str) -> None:
    text = {
        "list": json.dumps([row, row]),
        "pretty": "\n" + json.dumps([row, row], indent=1),
        "lines": json.dumps(row) + "\r\n\n" + json.dumps(row),
    }[name]
    path = write("data.json", text)
    first, second = read_rows(path)
    assert first.turns == second.turns == read_rows(path, fmt=detect_format(row))[0].turns
    assert [turn.role for turn in first.turns] == ["user", "assistant"]
    assert count_rows(path) == 2
    summary = check_file(path)
    assert (summary.rows, summary.answers, summary.format, summary.skipped) == (2, 2, detect_format(row), 0)


def test_normalises(write: Write) -> None:
    path = write(
        "a.jsonl",
        [
            ALPACA,
            {"instruction": "Q", "output": "A", "system": "S"},
            {"instruction": "Q", "input": None, "output": "A"},
        ],
    )
    first, second, third = read_rows(path)
    assert first == Conversation(
        None, (Turn("user", "Add.\n\n1 2"), Turn("assistant", "3")), "Add.", "1 2", (str(path), 1)
    )
    assert second.system == "S" and second.source == (str(path), 2) and second.turns[0].text == "Q"
    assert third.input == "" and third.turns[0].text == "Q"
    (chat,) = read_rows(write("c.jsonl", [CHAT]))
    assert chat.system == "S" and chat.answers == ("A",) and chat.instruction is None
    assert chat.messages() == CHAT["messages"]


def test_lines_of_a_list_are_those_of_the_file(write: Write) -> None:
    path = write("a.json", "[\n" + ",\n\n".join(json.dumps(ALPACA) for _ in range(3)) + "\n]")
    assert [row.source[1] for row in read_rows(path)] == [2, 4, 6]


def test_byte_order_mark_is_accepted(write: Write) -> None:
    for text in (json.dumps(ALPACA), json.dumps([ALPACA])):
        path = write("a.json", b"\xef\xbb\xbf" + text.encode())
        assert len(read_rows(path)) == count_rows(path) == 1


def test_missing_file_names_the_nearest(write: Write, tmp_path: Path) -> None:
    write("train.jsonl", [ALPACA])
    text = error_of(tmp_path / "trian.jsonl")
    assert "not found" in text and str(tmp_path / "train.jsonl") in text
    assert "no folder" in error_of(str(tmp_path / "nowhere" / "a.json"))
    with pytest.raises(DataError, match="not found"):
        count_rows(tmp_path / "trian.jsonl")


@pytest.mark.parametrize("content", ["", " \n\n", "[]", "[ \n ]"])
def test_empty_file(write: Write, content: str) -> None:
    path = write("a.json", content)
    text = error_of(path)
    assert str(path) in text and ("empty" in text or "no rows" in text)


def test_invalid_line(write: Write) -> None:
    good = json.dumps(ALPACA)
    path = write("a.jsonl", f'{good}\n\n{{"instruction": "x", "output": oops}}\n{good}\n')
    text = error_of(path)
    assert f"{path}: line 3: invalid JSON at column 32" in text
    assert '"output": oops}' in text


@pytest.mark.parametrize(
    ("tail", "line", "essentials"),
    [
        (',\n{"instruction": oops}]', 3, ("column 17", "oops")),
        (',\n{"instruction": "x"', 3, ("Expecting",)),
        ("\n", 3, ("not closed", "cut")),
        (",\n]", 2, ("comma before the end",)),
        ("\n{}]", 3, ("expected ',' or ']'",)),
        ("]\n\nmore", 4, ("after the end", "more")),
    ],
)
def test_invalid_list(write: Write, tail: str, line: int, essentials: tuple[str, ...]) -> None:
    text = error_of(write("a.json", "[\n" + json.dumps(ALPACA) + tail))
    assert f"line {line}: invalid JSON" in text
    assert all(part in text for part in essentials)


def test_pretty_printed_object(write: Write) -> None:
    text = error_of(write("a.json", json.dumps({"version": 1, "data": [ALPACA]}, indent=2)))
    assert "one JSON object over several lines" in text and 'its key "data"' in text


@pytest.mark.parametrize(
    ("bad", "essentials"),
    [
        (
            {"instruction": "x", "ouput": "y"},
            ('no "output"', "keys found: instruction, ouput", 'rename "ouput" to "output"?'),
        ),
        ({"instruction": "x", "Output": "y"}, ('rename "Output" to "output"?',)),
        ({"instruction": "x", "response": "y"}, ('rename "response" to "output"?',)),
        ({"instruction": "x", "input": ""}, ('no "output"', "keys found: instruction, input")),
        ({"output": "x", "promt": "y"}, ('no "instruction"', "promt")),
        ({"instruction": "x", "output": " \n"}, ("empty answer", "empty_answers", "skip")),
        ({"instruction": " ", "output": "x"}, ('empty "instruction"',)),
        ({"instruction": "x", "output": None}, ('"output" is null', "expected text")),
        ({"instruction": "x", "output": 3}, ('"output" is a number',)),
        ({"instruction": "x", "output": "y", "input": ["z"]}, ('"input" is a list',)),
        ({"instruction": "x", "output": "\ud83d"}, ("surrogate", '"output"')),
        (["x"], ("the row is a list", "expected an object")),
        ({}, ("the object is empty",)),
        (CHAT, ('no "instruction"', "looks like messages", "read as alpaca")),
    ],
)
def test_bad_alpaca_row(write: Write, bad: Any, essentials: tuple[str, ...]) -> None:
    text = error_of(write("a.jsonl", [ALPACA, ALPACA, bad]))
    assert "line 3: " in text
    for part in essentials:
        assert part in text


@pytest.mark.parametrize(
    ("bad", "essentials"),
    [
        (turns(("user", "u")), ("must end with an assistant turn", "last is a user turn")),
        (turns(("system", "s")), ("must end with an assistant turn", "there is none")),
        (turns(("assistant", "a")), ("messages[1]", '"assistant"', "begin with a user turn")),
        (turns(("user", "u"), ("user", "u"), ("assistant", "a")), ("messages[2]", "alternate")),
        (turns(("user", "u"), ("assistant", "a"), ("assistant", "a")), ("messages[3]", "alternate")),
        (turns(("user", "u"), ("system", "s"), ("assistant", "a")), ("messages[2]", "only the first")),
        (turns(("user", "u"), ("assistant", "")), ("empty answer", "messages[2]")),
        (turns(("user", " "), ("assistant", "a")), ("empty user turn", "messages[1]")),
        (
            turns(("user", "u"), ("tool", "t"), ("assistant", "a")),
            ('a turn by "tool"', "must follow an answer with tool_calls"),
        ),
        (turns(("User", "u"), ("assistant", "a")), ('role "User"', 'did you mean "user"?')),
        ({"messages": "hi"}, ('"messages" is text', "list of turns")),
        ({"messages": ["hi"]}, ("messages[1] is text", "role and content")),
        ({"messages": [{"role": "user", "value": "u"}]}, ('messages[1] has no "content"', 'rename "value"')),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            ("messages[1]: a part has", 'no "text"'),
        ),
        ({"messages": []}, ("must end with an assistant turn",)),
    ],
)
def test_bad_chat_row(write: Write, bad: Any, essentials: tuple[str, ...]) -> None:
    text = error_of(write("a.jsonl", [CHAT, bad]))
    assert "line 2: " in text
    for part in essentials:
        assert part in text


def test_bad_sharegpt_row(write: Write) -> None:
    row = {"conversations": [{"from": "user", "value": "u"}, {"from": "gpt", "value": "a"}]}
    text = error_of(write("a.jsonl", [row]))
    assert 'role "user"' in text and "system, human, gpt" in text
    row = {"conversations": [{"role": "user", "content": "u"}]}
    assert 'no "from"' in error_of(write("a.jsonl", [row]))
    assert "(gpt)" in error_of(write("a.jsonl", [{"conversations": [{"from": "human", "value": "u"}]}]))


def test_unknown_format(write: Write) -> None:
    text = error_of(write("a.jsonl", [{"prompt": "x", "response": "y"}]))
    assert "line 1: unknown format: keys found: prompt, response" in text
    assert 'rename "prompt" to "instruction"?' in text
    with pytest.raises(ValueError, match=r'unknown data format "alpacca".*did you mean "alpaca"'):
        read_rows(write("a.jsonl", [ALPACA]), fmt="alpacca")
    with pytest.raises(ValueError, match='empty_answers="drop"'):
        read_rows(write("a.jsonl", [ALPACA]), empty_answers="drop")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["lines", "list"])
def test_not_utf8(write: Write, kind: str) -> None:
    row = json.dumps({"instruction": "x", "output": "caf\u00e9"}, ensure_ascii=False)
    text = {"lines": f"{json.dumps(ALPACA)}\n{row}", "list": f"[{json.dumps(ALPACA)},\n{row}]"}[kind]
    message = error_of(write("a.json", text.encode("latin-1")))
    column = row.index("\u00e9") + 1
    assert f"line 2: not UTF-8: byte 0xe9 at column {column}" in message and "iconv" in message
    assert read_rows(write("a.json", text))[1].answers == ("caf\u00e9",)


def test_utf16(write: Write) -> None:
    assert "UTF-16" in error_of(write("a.json", json.dumps([ALPACA]).encode("utf-16")))


def test_lists_the_first_problems_and_counts_all(write: Write) -> None:
    rows = [ALPACA] + [{"instruction": "x"}] * 30 + [{"instruction": "x", "output": ""}] * 2
    path = write("a.jsonl", rows)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    error = caught.value
    assert error.counts == {'no "output"': 30, "empty answer": 2}
    assert [problem.line for problem in error.problems] == list(range(2, 12))
    lines = str(error).splitlines()
    assert lines[0] == f'{path}: 32 problems (30 x no "output", 2 x empty answer)'
    assert lines[1].startswith("  line 2: ") and lines[-1] == "  ... and 22 more" and len(lines) == 12
    with pytest.raises(DataError, match="32 problems"):
        check_file(path)


def test_empty_answers_can_be_skipped(write: Write) -> None:
    path = write("a.jsonl", [{"instruction": "x", "output": ""}, ALPACA, turns(("user", "u"), ("assistant", " "))])
    assert 'no "instruction"' in error_of(path, empty_answers="skip")
    path = write("a.jsonl", [{"instruction": "x", "output": ""}, ALPACA])
    assert [row.source[1] for row in read_rows(path, empty_answers="skip")] == [2]
    summary = check_file(path, empty_answers="skip")
    assert (summary.rows, summary.skipped) == (1, 1)
    path = write("a.jsonl", [{"instruction": "x", "output": ""}])
    assert "all 1 rows are left out (empty answer)" in error_of(path, empty_answers="skip")


@pytest.mark.parametrize("row", [ALPACA, CHAT, SHAREGPT])
def test_parquet(tmp_path: Path, row: dict[str, Any]) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 3), path)
    found = read_rows(path)
    assert count_rows(path) == 3 and [item.source[1] for item in found] == [1, 2, 3]
    assert found[0].answers == (("3",) if row is ALPACA else ("A",))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"instruction": "x", "output": None}]), path)
    assert 'row 1: "output" is null' in error_of(path)
    path.write_bytes(b"nonsense")
    assert "not readable as parquet" in error_of(path)


def test_parquet_with_one_list_per_field(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    row = {"messages": {"role": ["user", "assistant"], "content": ["U", "A"]}}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert read_rows(path)[0].turns == (Turn("user", "U"), Turn("assistant", "A"))


def test_data_set_folder_through_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real `datasets.load_dataset`, with a folder in place of a hub name."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(ALPACA) + "\n" for _ in range(3)))
    (folder / "test.jsonl").write_text(json.dumps(ALPACA | {"output": ""}) + "\n")
    monkeypatch.chdir(tmp_path)
    assert len(read_rows("owner/name")) == 3
    assert len(read_rows("owner/name[train[:2]]")) == 2
    assert "row 1: empty answer" in error_of("owner/name[test]")
    assert "not loaded" not in error_of("owner/name[test]")
    assert "could not load it" in error_of("owner/name[validation]")
    assert "could not load it" in error_of("owner/no-such-data-set")
    assert not is_local("owner/name") and is_local(folder / "train.jsonl")
    with pytest.raises(DataError, match="cannot be counted"):
        count_rows("owner/name")


def test_hub_name_is_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load(name: str, config: str | None, split: str | None) -> Any:
        calls.append((name, config, split))
        data = datasets.Dataset.from_list([ALPACA])
        return data if split else datasets.DatasetDict({"dev": data, "test": data})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(read_rows("o/n:c[s]")) == len(read_rows("n[s]")) == 1
    assert calls == [("o/n", "c", "s"), ("n", None, "s")]
    assert 'no split "train"; name one of dev, test: "o/n:c[dev]"' in error_of("o/n:c")


def test_imports_stay_light() -> None:
    code = (
        "import sys, salient_ds.data.formats, salient_ds.data.templates, salient_ds.data.sampler; "
        "heavy = ('torch', 'transformers', 'datasets', 'pyarrow', 'deepspeed'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    path = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=path)
    assert done.stdout.strip() == "[]"


def test_a_list_on_one_line_names_rows(write: Write) -> None:
    bad: list[Any] = [ALPACA, {"instruction": "x"}, ALPACA, 5]
    text = error_of(write("a.json", json.dumps(bad)))
    assert 'row 2: no "output"' in text and "row 4: the row is a number" in text and "  line" not in text
    for indent in (0, 2):  # rows begin on lines of their own
        assert "line" in error_of(write("a.json", json.dumps(bad, indent=indent)))
    packed = f"[{json.dumps(ALPACA)}, {json.dumps(ALPACA)},\n{json.dumps(bad[1])}]"
    assert 'row 3: no "output"' in error_of(write("a.json", packed))
    cut = json.dumps([ALPACA] * 3)[:-9]
    assert "row 3: invalid JSON at column" in error_of(write("a.json", cut))
    latin = json.dumps([ALPACA, {"instruction": "x", "output": "caf\u00e9"}], ensure_ascii=False).encode("latin-1")
    assert "a.json: not UTF-8: byte 0xe9 at column" in error_of(write("a.json", latin))
    assert [row.where.rpartition(", ")[2] for row in read_rows(write("a.json", json.dumps([ALPACA] * 2)))] == [
        "row 1", "row 2"]  # fmt: skip


def test_a_row_longer_than_what_shows_the_layout(write: Write) -> None:
    long = {"instruction": "x", "output": "y" * 70_000}
    assert 'row 2: no "output"' in error_of(write("a.json", json.dumps([long, {"instruction": "x"}])))
    lines = f"[\n{json.dumps(long)},\n{json.dumps({'instruction': 'x'})}\n]"
    assert 'no "output"' in error_of(write("a.json", lines))
