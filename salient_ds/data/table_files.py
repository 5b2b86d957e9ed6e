"""CSV and TSV files with a line of column names, as a stream of (line, row). Every value is text.

A CSV file quotes as RFC 4180 says. A TSV file quotes nothing, as the files of GLUE: a quotation mark in it is a
character like any other.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from salient_ds.data.conversation import DataError, Problem
from salient_ds.data.json_files import open_text_bytes

_LONGEST = 1 << 24  # characters of one field; the csv module's own limit of 131,072 is shorter than some articles


def is_table(path: Path) -> bool:
    """Whether the name says that the file is CSV or TSV, compressed with gzip or not."""
    return _suffix(path) in (".csv", ".tsv")


def table_rows(path: Path) -> Iterator[tuple[int, object | Problem]]:
    """Yields (line on which the row ends, row as a dict of texts). A row with another number of fields is a Problem.

    Raises DataError for a file that is empty or not UTF-8, and for column names that are empty or come twice.
    """
    csv.field_size_limit(_LONGEST)
    with open_text_bytes(path) as raw, io.TextIOWrapper(raw, "utf-8-sig", newline="") as file:
        if _suffix(path) == ".tsv":
            reader = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE, strict=True)
        else:
            reader = csv.reader(file, strict=True)
        try:
            names = next(reader, None)
            _check_names(path, names)
            assert names is not None
            for values in reader:
                if not values:
                    continue
                if len(values) != len(names):
                    what = f"{len(values)} fields, but the file has {len(names)} columns ({', '.join(names)})"
                    remedy = "quote fields that hold the separator, or take it out"
                    yield reader.line_num, Problem("fields", reader.line_num, f"{what}: {remedy}")
                else:
                    yield reader.line_num, dict(zip(names, values, strict=True))
        except UnicodeDecodeError as error:
            raise DataError.of(
                str(path),
                "encoding",
                f"not UTF-8 after line {reader.line_num} (byte 0x{error.object[error.start]:02x}): convert the file, "
                "for example: iconv -f latin1 -t utf-8",
            ) from None
        except csv.Error as error:
            what = f"line {reader.line_num}: not readable as a table: {error}"
            raise DataError.of(str(path), "table", what) from None


def count_table_rows(path: Path) -> int:
    """Number of rows below the line of names. Raises as :func:`table_rows`."""
    return sum(1 for _ in table_rows(path))


def _check_names(path: Path, names: list[str] | None) -> None:
    if not names:
        raise DataError.of(str(path), "empty", "the file is empty: its first line must hold the names of the columns")
    wrong = [name for name in names if not name.strip() or names.count(name) > 1]
    if wrong:
        raise DataError.of(
            str(path),
            "column names",
            f"the first line must hold the names of the columns, each once and none empty: {wrong[0]!r} is not so "
            f"(found {', '.join(map(repr, names[:8]))})",
        )


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
