"""Tokenised data on disk, mapped into memory: made by one process of a machine, read by all of them.

An entry is a folder ``tokens-1/KEY`` with two arrays per column and a manifest. It is written under another name and
renamed when it is whole. Whoever reads it hashes the rows and compares with the manifest, so a damaged entry is found
and made anew. Entries hold no pickled objects. A folder that cannot be used costs the cache, never the run.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from salient_ds.data.dataset import InstructionDataset, RaggedColumn
from salient_ds.own_files import OwnFileError, read_object, write_object
from salient_ds.strict import Reported, expanded

_FORMAT = "tokens-1"
_MANIFEST = "manifest.json"
_POLL = 0.2
PATIENCE = 1800.0
"""Seconds without a sign of life of the process that tokenises, after which others give up."""
Item = TypeVar("Item")
Facts = dict[str, Any]
"""What belongs to the rows besides: plain data for JSON."""
Beat = Callable[[], None]
Build = Callable[[Beat], tuple[InstructionDataset, Facts]]
"""Makes the rows. It calls its argument now and then, as a sign of life for those who wait."""


class CacheStuck(RuntimeError, Reported):
    """Another process holds the entry and shows no sign of life. The message names it, and the remedy."""


class Cached(NamedTuple):
    """Rows and facts, and what a user should know about where they are from."""

    rows: InstructionDataset
    facts: Facts
    note: str


class _Damaged(ValueError):
    """An entry is not what its manifest says."""


def cache_folder(chosen: str | None) -> Path:
    """The folder of the cache: ``data.cache_dir``, or the default."""
    if chosen is not None:
        return Path(expanded(chosen))
    if own := os.environ.get("SALIENT_DS_CACHE"):
        return Path(expanded(own))
    parent = os.environ.get("HF_HOME") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(expanded(parent)) / "salient_ds"


def kept(folder: Path, key: str, what: str, need: int, build: Build, patience: float = PATIENCE) -> Cached:
    """The rows of an entry. The first process that asks makes them, and the others wait for it.

    Args:
        folder: see :func:`cache_folder`; it is made if it is not there.
        key: names the entry: a digest of everything that decides on the rows.
        what: what is tokenised, for messages.
        need: bytes that the entry may take. With less space, it is not written.
        patience: seconds to wait without a sign of life of the process that makes the rows.

    Raises:
        CacheStuck: no sign of life for so long.
        Exception: whatever ``build`` raises.
    """
    entry = folder / _FORMAT / key
    try:
        if (found := _whole(entry)) is not None:
            return found
    except (_Damaged, OSError):
        pass  # looked at again by the process that holds the lock
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(entry.parent).free
        if free < need:
            raise OSError(errno.ENOSPC, f"{free / 2**20:,.0f} MiB are free, {need / 2**20:,.0f} may be needed")
        lock = os.open(entry.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        return _without(folder, error, build)
    try:
        try:
            _acquire(lock, entry.with_suffix(".lock"), what, patience)
        except OSError as error:  # a file system without locks
            return _without(folder, error, build)
        return _made(entry, lock, build)
    finally:
        os.close(lock)


def beating(items: Iterable[Item], beat: Beat, every: int = 1000) -> Iterator[Item]:
    """The same items, with a sign of life after every so many."""
    for count, item in enumerate(items):
        if count % every == 0:
            beat()
        yield item


def _without(
    folder: Path, error: OSError, build: Build, made: tuple[InstructionDataset, Facts] | None = None
) -> Cached:
    rows, facts = made or build(lambda: None)
    remedy = "set data.cache_dir to a folder with room that you may write to, or data.cache=false"
    why = error.strerror or str(error)
    return Cached(rows, facts, f"not kept in the cache {folder} ({why}), so every process tokenises alone: {remedy}")


def _acquire(lock: int, place: Path, what: str, patience: float) -> None:
    """Take the lock, and leave the name of this process in it. The system frees it when a process dies."""
    last_sign, seen = time.monotonic(), place.stat().st_mtime_ns
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            pass
        time.sleep(_POLL)
        if (sign := place.stat().st_mtime_ns) != seen:
            last_sign, seen = time.monotonic(), sign
        if time.monotonic() - last_sign > patience:
            holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
            raise CacheStuck(
                f"waited {patience:,.0f} s without a sign of life for {holder}, which tokenises {what} for all "
                f"processes and holds {place}: end that process, or set data.cache=false"
            )
    os.truncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _made(entry: Path, lock: int, build: Build) -> Cached:
    """The entry, made if it is not there whole. The caller holds the lock."""
    damage = ""
    try:
        if (found := _whole(entry)) is not None:
            return found
    except (_Damaged, OSError) as error:
        damage = f"; the entry that was there was damaged ({error})"
    made = build(lambda: os.utime(lock))
    try:
        with _aside(entry) as fresh:
            _write(fresh, *made, beat=lambda: os.utime(lock))
            if entry.exists():
                shutil.rmtree(entry)
            fresh.rename(entry)
        found = _whole(entry)
    except OSError as error:
        return _without(entry.parents[1], error, build, made)
    except _Damaged as error:
        return _without(
            entry.parents[1], OSError(errno.EIO, f"it does not give back what was written: {error}"), build, made
        )
    assert found is not None, "an entry that was just renamed"
    return found._replace(note=f"tokenised, and kept in the cache {entry}{damage}")


@contextmanager
def _aside(entry: Path) -> Iterator[Path]:
    """An empty folder beside the entry, gone at the end unless it was renamed. Those of dead processes go, too."""
    for left in entry.parent.glob(f"{entry.name}.new"):
        shutil.rmtree(left, ignore_errors=True)
    fresh = entry.with_suffix(".new")
    fresh.mkdir()
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write(folder: Path, rows: InstructionDataset, facts: Facts, beat: Beat) -> None:
    for name, column in rows.ragged.items():
        for part, array in (("offsets", column.offsets), ("values", column.values)):
            beat()
            with (folder / f"{name}.{part}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
    with (folder / "num_targets.npy").open("wb") as file:
        np.save(file, rows.num_targets, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    beat()
    manifest = {"rows": len(rows), "columns": rows.columns, "fingerprint": rows.fingerprint(), "facts": facts,
                "targets": int(rows.num_targets.sum())}  # fmt: skip
    write_object(folder / _MANIFEST, manifest)


def _whole(entry: Path) -> Cached | None:
    """An entry, checked; None if there is none. Raises _Damaged or OSError."""
    if not entry.is_dir():
        return None
    try:
        manifest = read_object(entry / _MANIFEST)
        columns = {
            name: RaggedColumn.of(_mapped(entry / f"{name}.offsets.npy"), _mapped(entry / f"{name}.values.npy"))
            for name in manifest["columns"]
        }
        rows = InstructionDataset.of(columns, np.arange(int(manifest["rows"])))
        targets = _mapped(entry / "num_targets.npy")
        for name, column in columns.items():
            if len(column.offsets) != len(rows) + 1 or column.offsets[-1] != len(column.values):
                raise _Damaged(f"column {name} has not the {len(rows):,} rows of the manifest")
        if rows.fingerprint() != manifest["fingerprint"]:
            raise _Damaged("its rows do not have the sha256 of the manifest")
        if len(targets) != len(rows) or int(targets.sum()) != manifest["targets"]:
            raise _Damaged("its numbers of targets are not those of the manifest")
        facts = dict(manifest["facts"])
    except FileNotFoundError as error:
        raise _Damaged(f"{Path(error.filename or '').name} is missing") from error
    except (OwnFileError, EOFError, KeyError, TypeError, ValueError, IndexError) as error:
        raise error if isinstance(error, _Damaged) else _Damaged(str(error)) from error
    rows.num_targets = targets
    return Cached(rows, facts, f"read from the cache {entry}")


def _mapped(path: Path) -> Any:
    """A file of our own as an array without a copy. Raises OSError, or ValueError if it is damaged."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
