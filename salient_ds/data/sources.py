"""Where rows come from: JSON lists, JSONL, CSV, TSV and parquet files, and data sets that `datasets` loads by name.

Nothing here knows what a row means. Imports neither torch nor transformers nor `datasets`.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from salient_ds.data.conversation import DataError, Problem
from salient_ds.data.json_files import (
    count_lines,
    is_json_list,
    jsonl_rows,
    list_rows,
    numbered_rows,
    rows_share_lines,
)
from salient_ds.data.remote import (
    HubName,
    count_parquet,
    how_to_fetch,
    hub_rows,
    is_offline,
    parquet_rows,
    parse_hub_name,
)
from salient_ds.data.table_files import count_table_rows, is_table, table_rows
from salient_ds.strict import expanded, nearest

_SUFFIXES = (".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".gz")


class Source(NamedTuple):
    """A source of rows. `unit` is what messages call a row's number: "line" or "row"."""

    name: str
    unit: str
    rows: Callable[[], Iterator[tuple[int, object | Problem]]]
    nulls: bool = False
    """Rows come from Arrow, whose structs hold null for every field that other rows have."""


def open_source(path: str | Path) -> Source:
    """The rows behind a path or a data set name. Nothing is read yet. Raises DataError for a missing file."""
    located = locate(path)
    if isinstance(located, HubName):
        return Source(str(path), "row", lambda: hub_rows(str(path), located), nulls=True)
    if _is_parquet(located):
        return Source(str(path), "row", lambda: parquet_rows(located), nulls=True)
    with _unpacking(located):
        if not is_table(located) and is_json_list(located) and rows_share_lines(located):
            return Source(str(path), "row", lambda: _unpacked(located, numbered_rows))
        read = table_rows if is_table(located) else list_rows if is_json_list(located) else jsonl_rows
    return Source(str(path), "line", lambda: _unpacked(located, read))


def is_local(path: str | Path) -> bool:
    """Whether `path` is a local file, rather than a data set to load by name. Raises DataError for a missing file."""
    return not isinstance(locate(path), HubName)


def loading_note(path: str | Path) -> str:
    """What to say of a data set that is loaded by name later: it is unchecked, and may have to be fetched."""
    located = locate(path)
    fetch = how_to_fetch(located) if isinstance(located, HubName) and is_offline() else ""
    return f"is loaded by name when training starts: nothing about it was checked{fetch}"


def count_rows(path: str | Path) -> int:
    """Number of rows of a local file, without validation. It counts lines, or reads the parquet footer.

    Raises DataError for a missing or empty file, and for a `datasets` name (which would have to be downloaded).
    """
    located = locate(path)
    if isinstance(located, HubName):
        raise DataError.of(
            str(path),
            "not local",
            "a data set loaded by name cannot be counted before it is downloaded",
        )
    if _is_parquet(located):
        return count_parquet(located)
    with _unpacking(located):
        if is_table(located):
            return count_table_rows(located)
        if is_json_list(located):
            return sum(1 for _ in list_rows(located))
        return count_lines(located)


def locate(path: str | Path) -> Path | HubName:
    """A local file that exists, or a data set name. Raises DataError for a missing file."""
    local = Path(expanded(str(path)))
    if local.is_file():
        return local
    text = str(path)
    looks_local = isinstance(path, Path) or local.suffix in _SUFFIXES or text.startswith((".", "/", "~")) or "*" in text
    hub = parse_hub_name(text)
    if hub is not None and (not looks_local or Path(hub.name).expanduser().is_dir()):
        return hub
    raise DataError.of(text, "missing", _missing_file(local))


Rows = Iterator[tuple[int, object | Problem]]


def _unpacked(path: Path, read: Callable[[Path], Rows]) -> Rows:
    with _unpacking(path):
        yield from read(path)


@contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    """Raises DataError for a file compressed with gzip that is cut or damaged."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = f"the compressed file is cut or damaged ({error}): copy or fetch it again"
        raise DataError.of(str(path), "gzip", what) from None


def _missing_file(path: Path) -> str:
    folder = path.parent
    if set(str(path)) & set("*?"):
        return "no file matches this pattern"
    if not folder.is_dir():
        return f"file not found: there is no folder {folder}"
    near = nearest(path.name, [entry.name for entry in folder.iterdir()])
    return f"file not found{f'; did you mean {folder / near}?' if near else ''}"


def _is_parquet(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".parquet" or file.read(4) == b"PAR1"
