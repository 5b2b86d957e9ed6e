"""One part of instruction data, tokenised: from the cache of this machine, or made by this process."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from salient_ds.config.data import DataConfig
from salient_ds.data.cache import Beat, Facts, beating, cache_folder, kept
from salient_ds.data.cache_key import entry_key
from salient_ds.data.dataset import InstructionDataset, build_dataset
from salient_ds.data.formats import FileSummary, read_data
from salient_ds.data.remote import load_named
from salient_ds.data.sources import locate
from salient_ds.data.template_base import Template
from salient_ds.data.token_processes import useful
from salient_ds.data.token_report import TokenizationReport

_DECIDE = ("format", "max_length", "empty_answers", "bad_rows", "rewritten_history")
"""Keys of section ``data`` that decide on the rows, besides the template and packing."""
_BYTES_PER_BYTE = 4
"""Space that an entry may take, per byte of the data file: 8 bytes per token, or 16 if packed."""


def read_part(
    name: str,
    path: str,
    data: DataConfig,
    tokenizer: Any,
    template: Template,
    packing: bool,
    fmt: str | None = None,
) -> tuple[InstructionDataset, list[str]]:
    """Rows of ``path``, and lines for the log. With or without the cache, the rows are the same.

    Args:
        name: the part, as in "train".
        fmt: format of the rows; None for ``data.format``.

    Raises:
        DataError: the file is missing or holds bad rows.
        ValueError: no answer is left of it.
        CacheStuck: the process that tokenises for this machine shows no sign of life.
    """

    def build(beat: Beat) -> tuple[InstructionDataset, Facts]:
        rows, summary = read_data(path, fmt or data.format, data.empty_answers, data.bad_rows)
        items, workers = beating(rows, beat), useful(data.workers, len(rows))
        dataset, report = build_dataset(
            items, template, tokenizer, data.max_length, packing, True, data.bad_rows, workers
        )
        return dataset, {"file": asdict(summary), "report": asdict(report)}

    source = _identified(path) if data.cache else None
    if source is not None:
        options = {key: getattr(data, key) for key in _DECIDE} | {"packing": packing, "suffix": source.suffixes}
        options |= {"format": fmt or data.format}
        key = entry_key(source.content, template, tokenizer, options)
        found = kept(cache_folder(data.cache_dir), key, path, _BYTES_PER_BYTE * source.size, build)
        dataset, facts, more = found.rows, found.facts, [f"{name}: {found.note}"]
    else:
        dataset, facts = build(lambda: None)
        more = []
    summary = replace(FileSummary(**facts["file"]), path=path)
    report = TokenizationReport(**(facts["report"] | {"refused": Counter(facts["report"]["refused"])}))
    return dataset, [*summary.notes(name), f"{name}: {report.summary()}", *more]


class _Identified(NamedTuple):
    """What the rows of a source are known by, and bytes that they have."""

    content: Path | str
    suffixes: list[str]
    size: int


def _identified(path: str) -> _Identified | None:
    """A source that the cache can know again; None for a data set by name without a fingerprint."""
    place = locate(path)
    if isinstance(place, Path):
        return _Identified(place, place.suffixes, place.stat().st_size)
    loaded = load_named(path, place)
    content, table = getattr(loaded, "_fingerprint", None), getattr(loaded, "data", None)
    if not content or table is None:
        return None
    return _Identified(f"datasets:{content}:{len(loaded)}", [], int(table.nbytes))
