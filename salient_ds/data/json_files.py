"""JSONL files and JSON lists as a stream of (line, row); standard library only.

JSONL is read line by line. Reading continues after a bad line, so that all bad lines can be listed. A JSON list is read
as a whole and decoded row by row, so that the line of each row is known. It ends at its first syntax error. Where
several rows of a list share a line, rows are counted instead of lines.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from salient_ds.data.conversation import DataError, Problem

_GZIP = b"\x1f\x8b"
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
ONE_OBJECT = "one object"
"""Kind of the problem of a file that is one JSON object over several lines."""
_SMALL = 1 << 28  # bytes up to which a file is read once more to explain an error
_HEAD = 1 << 16  # bytes that show how a list is written
_EXCERPT = 40  # characters shown around a syntax error, half of them before it


def open_text_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked if it is compressed with gzip (whatever its name)."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    return cast(IO[bytes], gzip.open(path, "rb")) if packed else path.open("rb")


def is_json_list(path: Path) -> bool:
    """Whether the first character that is not white space opens a list. Raises DataError for UTF-16 and empty
    files."""
    with open_text_bytes(path) as file:
        head = file.read(4096)
        while head and not head.removeprefix(_BOM).strip():
            head = file.read(4096)
    if head.startswith(_UTF16):
        remedy = f"convert it: iconv -f utf-16 -t utf-8 {path.name}"
        raise DataError.of(str(path), "encoding", f"the file is UTF-16, not UTF-8; {remedy}")
    if not head:
        wanted = "expected a JSON list, or JSON objects one per line"
        raise DataError.of(str(path), "empty", f"the file is empty: {wanted}")
    return head.removeprefix(_BOM).lstrip().startswith(b"[")


def jsonl_rows(path: Path) -> Iterator[tuple[int, object | Problem]]:
    """Yields (line, row) for every line that is not blank. A row that cannot be decoded is a Problem instead."""
    first = True
    with open_text_bytes(path) as file:
        for line, raw in enumerate(file, start=1):
            raw = raw.removeprefix(_BOM) if line == 1 else raw
            if not raw.strip():
                continue
            text = _decode(raw, line)
            if isinstance(text, Problem):
                yield line, text
                continue
            try:
                row: object = json.loads(text)
            except json.JSONDecodeError as error:
                spread = _spread_object(path) if first else None
                yield line, spread or _problem_at(text, error.pos, error.msg, line)
                if spread:
                    return
            except RecursionError:
                yield line, Problem("invalid JSON", line, "it is nested too deeply")
            else:
                yield line, row
            first = False


def rows_share_lines(path: Path) -> bool:
    """Whether the second row of a JSON list begins on the line of the first one, as in a list on one line."""
    with open_text_bytes(path) as file:
        text = file.read(_HEAD).removeprefix(_BOM).decode("utf-8", "replace")
    first = _skip(text, text.find("[") + 1)
    try:
        _, end = json.JSONDecoder().raw_decode(text, first)
    except (ValueError, RecursionError):  # a row longer than the head, or bad JSON
        return "\n" not in text[first:]
    end = _skip(text, end)
    return text.startswith(",", end) and "\n" not in text[first : _skip(text, end + 1)]


def numbered_rows(path: Path) -> Iterator[tuple[int, object | Problem]]:
    """As :func:`list_rows`, with the number of the row, from 1, instead of its line."""
    for number, (_, row) in enumerate(list_rows(path), start=1):
        if isinstance(row, Problem):
            number = 0 if row.kind == "encoding" else number  # found before the rows are told apart
            row = row._replace(line=number)
        yield number, row


def list_rows(path: Path) -> Iterator[tuple[int, object | Problem]]:
    """Yields (line, row) for a file that holds one JSON list."""
    text = _decode(_all_bytes(path).removeprefix(_BOM), 1)
    if isinstance(text, Problem):
        yield text.line, text
        return
    decode = json.JSONDecoder().raw_decode
    position = _skip(text, text.index("[") + 1)
    counted, line = 0, 1
    while not text.startswith("]", position):
        line += text.count("\n", counted, position)
        counted = position
        try:
            row, end = decode(text, position)
        except json.JSONDecodeError as error:
            problem = _problem_at(text, error.pos, error.msg)
            yield problem.line, problem
            return
        except RecursionError:
            yield line, Problem("invalid JSON", line, "it is nested too deeply")
            return
        yield line, row
        end = _skip(text, end)
        if text.startswith(",", end):
            position = _skip(text, end + 1)
            if text.startswith("]", position):
                problem = _problem_at(text, end, "comma before the end of the list")
                yield problem.line, problem
                return
        elif text.startswith("]", end):
            position = end
        else:
            what = "expected ',' or ']'" if end < len(text) else "the list is not closed, the file seems cut"
            problem = _problem_at(text, end, what)
            yield problem.line, problem
            return
    if text[position + 1 :].strip():
        problem = _problem_at(text, _skip(text, position + 1), "text after the end of the list")
        yield problem.line, problem


def _all_bytes(path: Path) -> bytes:
    with open_text_bytes(path) as file:
        return file.read()


def count_lines(path: Path) -> int:
    """Lines of a JSONL file that are not blank, without decoding them."""
    with open_text_bytes(path) as file:
        return sum(1 for raw in file if raw.removeprefix(_BOM).strip())


def _skip(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None, "the pattern matches the empty string"
    return match.end()


def _decode(raw: bytes, first_line: int) -> str | Problem:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line = first_line + before.count(b"\n")
        column = len(before[before.rfind(b"\n") + 1 :].decode("utf-8")) + 1
        return Problem(
            "encoding",
            line,
            f"not UTF-8: byte 0x{raw[error.start]:02x} at column {column}; convert the file, "
            "for example: iconv -f latin1 -t utf-8",
        )


def _problem_at(text: str, position: int, message: str, first_line: int = 1) -> Problem:
    before = text[:position]
    line = first_line + before.count("\n")
    column = position - before.rfind("\n")
    around = text[max(0, position - _EXCERPT // 2) : position + _EXCERPT // 2]
    excerpt = " ".join(around.split())
    near = f", near {excerpt!r}" if excerpt else ""
    return Problem("invalid JSON", line, f"invalid JSON at column {column}: {message}{near}")


def _spread_object(path: Path) -> Problem | None:
    """The Problem of a file that is one JSON object over many lines; None if it is not such a file.

    This explains a first line that does not parse.
    """
    if path.stat().st_size > _SMALL:
        return None
    try:
        whole = json.loads(_all_bytes(path))
    except (ValueError, RecursionError):
        return None
    if not isinstance(whole, dict):
        return None
    inner = [key for key, value in whole.items() if isinstance(value, list) and value and isinstance(value[0], dict)]
    remedy = f'save the list under its key "{inner[0]}" as the file' if inner else "put it into a list: [ ... ]"
    return Problem(
        ONE_OBJECT,
        1,
        f"the file is one JSON object over several lines, expected a list or one object per line: {remedy}",
    )
