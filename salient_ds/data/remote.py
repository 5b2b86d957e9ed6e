"""Reads rows that need a library: local parquet files, and data sets of the `datasets` library.

The libraries are imported inside the functions, so that reading JSON stays light. Local parquet files are read with
pyarrow, which `datasets` is built on. `datasets` itself would import torch and write a second copy of the file to its
cache.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from salient_ds.data.conversation import DataError
from salient_ds.strict import expanded

_HUB = re.compile(r"(?P<name>[^:\[\]]+)(:(?P<config>[^\[\]]+))?(\[(?P<split>.+)\])?")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HubName(NamedTuple):
    """A data set name as written in a config: "name" or "name:config", each with an optional "[split]"."""

    name: str
    config: str | None
    split: str | None


def parse_hub_name(text: str) -> HubName | None:
    """Splits "owner/name:config[split]". The name may be a local folder. None if the text is not such a name."""
    match = _HUB.fullmatch(text)
    if match is None:
        return None
    name = match["name"]
    if _HUB_NAME.fullmatch(name) is None and not Path(expanded(name)).is_dir():
        return None
    return HubName(name, match["config"], match["split"])


def parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    """Yields (row number from 1, row). Raises DataError when the file is not readable as parquet."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches(batch_size=1024):
                for value in batch.to_pylist():
                    row += 1
                    yield row, value
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError.of(str(path), "parquet", f"not readable as parquet: {error}") from None


def count_parquet(path: Path) -> int:
    """Number of rows, from the file's footer."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        return int(parquet.read_metadata(path).num_rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError.of(str(path), "parquet", f"not readable as parquet: {error}") from None


def is_offline() -> bool:
    """Whether the environment keeps `datasets` and the Hub's client from the network."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


def how_to_fetch(hub: HubName) -> str:
    """The one command that gets the files of a data set, for a machine without network; empty for a local folder."""
    if Path(hub.name).expanduser().is_dir():
        return ""
    folder = hub.name.rpartition("/")[2]
    config, split = f":{hub.config}" if hub.config else "", f"[{hub.split}]" if hub.split else ""
    command = f"hf download {hub.name} --repo-type dataset --local-dir {folder}"
    return (
        f". Without network: run `{command}` on a machine that has one, copy the folder here, and name it instead: "
        f'"./{folder}{config}{split}" (one .parquet, .csv or .jsonl file with the same columns does too)'
    )


def hub_rows(text: str, hub: HubName) -> Iterator[tuple[int, object]]:
    """Yields (row number from 1, row) of a data set. Raises as :func:`load_named`."""
    yield from enumerate(load_named(text, hub), start=1)


def load_named(text: str, hub: HubName) -> Any:
    """A data set as `datasets.load_dataset` gives it (which keeps its own cache, mapped into memory).

    Without a split in the name, "train" is taken, or the only split. Raises DataError when the data set cannot be
    loaded, or when the split must be named.
    """
    import datasets

    folder = Path(hub.name).expanduser()
    name = str(folder) if folder.is_dir() else hub.name
    try:
        loaded: Any = datasets.load_dataset(name, hub.config, split=hub.split)
    except Exception as error:  # the library raises its own, the hub's, OS and value errors: all mean "not loaded"
        reason = " ".join(str(error).split())[:300]
        raise DataError.of(
            text,
            "not loaded",
            f"no local file, and datasets.load_dataset could not load it: {type(error).__name__}: {reason}"
            f"{how_to_fetch(hub)}",
        ) from error
    if isinstance(loaded, dict):
        if "train" not in loaded and len(loaded) > 1:
            names = ", ".join(loaded)
            raise DataError.of(text, "split", f'no split "train"; name one of {names}: "{text}[{next(iter(loaded))}]"')
        loaded = loaded["train"] if "train" in loaded else next(iter(loaded.values()))
    return loaded
