"""The cache of tokenised rows: the same rows as without it, made once, never half, never silently wrong."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from salient_ds.data import cache
from salient_ds.data.cache import Beat, CacheStuck, beating, cache_folder, kept
from salient_ds.data.dataset import InstructionDataset

ROWS = [
    {"input_ids": [k, k + 1, k + 2], "labels": [-100, k + 1, k + 2][: 2 + k % 2] + [5] * (1 - k % 2)} for k in range(9)
]


class Maker:
    """Makes nine rows, and counts how often."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, beat: Beat) -> tuple[InstructionDataset, dict[str, Any]]:
        self.calls += 1
        return InstructionDataset(beating(ROWS, beat, 2)), {"kept": len(ROWS)}


def entry(folder: Path) -> Path:
    return folder / "tokens-1" / "key"


def fresh() -> InstructionDataset:
    return InstructionDataset(ROWS)


def test_rows_are_made_once_and_are_the_same(tmp_path: Path) -> None:
    maker = Maker()
    first = kept(tmp_path, "key", "a.jsonl", 0, maker)
    second = kept(tmp_path, "key", "a.jsonl", 0, maker)
    assert maker.calls == 1 and "tokenised, and kept" in first.note and "read from the cache" in second.note
    for found in (first, second):
        assert found.rows.fingerprint() == fresh().fingerprint() and found.facts == {"kept": 9}
        assert found.rows.num_targets.tolist() == fresh().num_targets.tolist()
        assert found.rows.lengths.tolist() == fresh().lengths.tolist() and found.rows.columns == fresh().columns
        assert found.rows.select([7, 2]).num_targets.tolist() == fresh().select([7, 2]).num_targets.tolist()
    kept(tmp_path, "other", "a.jsonl", 0, maker)
    assert maker.calls == 2


def test_rows_are_mapped_and_not_copied(tmp_path: Path) -> None:
    rows = kept(tmp_path, "key", "a.jsonl", 0, Maker()).rows
    for part in (rows, rows.select([1, 2, 8]), rows[3:5]):
        base: Any = part.ragged["labels"].values
        while isinstance(base, np.ndarray) and not isinstance(base, np.memmap):
            base = base.base
        assert isinstance(base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        rows[0]["labels"][0] = 1


def cut(place: Path) -> None:
    file = place / "labels.values.npy"
    file.write_bytes(file.read_bytes()[:-4])


def flipped(place: Path) -> None:
    file = place / "input_ids.values.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def wrong_targets(place: Path) -> None:
    np.save(place / "num_targets.npy", np.zeros(9, np.int64))


def wrong_offsets(place: Path) -> None:
    np.save(place / "labels.offsets.npy", np.arange(4))


def no_manifest(place: Path) -> None:
    (place / "manifest.json").unlink()


def half_manifest(place: Path) -> None:
    (place / "manifest.json").write_text((place / "manifest.json").read_text()[:40])


def no_column(place: Path) -> None:
    (place / "labels.values.npy").unlink()


def empty_file(place: Path) -> None:
    (place / "labels.offsets.npy").write_bytes(b"")


@pytest.mark.parametrize(
    "damage", [cut, flipped, wrong_targets, wrong_offsets, no_manifest, half_manifest, no_column, empty_file]
)
def test_a_damaged_entry_is_made_anew_aloud(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    maker = Maker()
    kept(tmp_path, "key", "a.jsonl", 0, maker)
    damage(entry(tmp_path))
    again = kept(tmp_path, "key", "a.jsonl", 0, maker)
    assert maker.calls == 2 and "damaged" in again.note and again.rows.fingerprint() == fresh().fingerprint()
    assert "read from" in kept(tmp_path, "key", "a.jsonl", 0, maker).note and maker.calls == 2


def test_what_a_dead_process_left_is_not_taken_for_whole(tmp_path: Path) -> None:
    maker = Maker()
    kept(tmp_path, "key", "a.jsonl", 0, maker)
    entry(tmp_path).rename(entry(tmp_path).with_suffix(".new"))
    (entry(tmp_path).with_suffix(".new") / "manifest.json").unlink()
    kept(tmp_path, "key", "a.jsonl", 0, maker)
    assert maker.calls == 2 and not entry(tmp_path).with_suffix(".new").exists()


def test_too_little_room_costs_the_cache_and_not_the_run(tmp_path: Path) -> None:
    found = kept(tmp_path, "key", "a.jsonl", 2**60, Maker())
    assert found.rows.fingerprint() == fresh().fingerprint() and not entry(tmp_path).exists()
    assert "No space" in found.note or "MiB are free" in found.note
    assert "data.cache_dir" in found.note and "\n" not in found.note


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "write_object", full)
    maker = Maker()
    found = kept(tmp_path, "key", "a.jsonl", 0, maker)
    assert maker.calls == 1 and "No space left" in found.note and found.rows.fingerprint() == fresh().fingerprint()
    assert [path.name for path in entry(tmp_path).parent.iterdir()] == ["key.lock"]


def test_a_folder_that_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = kept(tmp_path / "file", "key", "a.jsonl", 0, Maker())
    assert "not kept in the cache" in found.note and found.rows.fingerprint() == fresh().fingerprint()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_still_gives_what_it_holds(tmp_path: Path) -> None:
    maker = Maker()
    kept(tmp_path, "key", "a.jsonl", 0, maker)
    entry(tmp_path).parent.chmod(0o555)
    try:
        assert "read from" in kept(tmp_path, "key", "a.jsonl", 0, maker).note
        assert "Permission denied" in kept(tmp_path, "other", "a.jsonl", 0, maker).note
    finally:
        entry(tmp_path).parent.chmod(0o755)


def test_without_the_right_to_lock_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the folder of another user."""

    def refused(*_: Any) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    maker = Maker()
    kept(tmp_path, "key", "a.jsonl", 0, maker)
    monkeypatch.setattr("salient_ds.data.cache.os.open", refused)
    assert "read from" in kept(tmp_path, "key", "a.jsonl", 0, maker).note
    found = kept(tmp_path, "other", "a.jsonl", 0, maker)
    assert "Permission denied" in found.note and found.rows.fingerprint() == fresh().fingerprint()


def test_a_stuck_process_is_named(tmp_path: Path) -> None:
    entry(tmp_path).parent.mkdir(parents=True)
    place = entry(tmp_path).with_suffix(".lock")
    place.write_text("process 77 on elsewhere\n")
    maker = Maker()
    with place.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(CacheStuck, match=r"process 77 on elsewhere, which tokenises a\.jsonl .* data\.cache=false"):
            kept(tmp_path, "key", "a.jsonl", 0, maker, patience=0.3)
    assert maker.calls == 0
    assert "tokenised" in kept(tmp_path, "key", "a.jsonl", 0, maker, patience=0.3).note


def test_errors_of_the_rows_are_not_kept(tmp_path: Path) -> None:
    def bad(beat: Beat) -> Any:
        raise ValueError("row 3 is bad")

    with pytest.raises(ValueError, match="row 3 is bad"):
        kept(tmp_path, "key", "a.jsonl", 0, bad)
    assert "tokenised" in kept(tmp_path, "key", "a.jsonl", 0, Maker()).note


def _at_once(folder: Path, log: Path, gate: Any) -> None:
    def build(beat: Beat) -> tuple[InstructionDataset, dict[str, Any]]:
        with log.open("a") as file:
            file.write("made\n")
        return Maker()(beat)

    gate.wait(20)
    rows = kept(folder, "key", "a.jsonl", 0, build).rows
    with log.open("a") as file:
        file.write(rows.fingerprint() + "\n")


def test_of_processes_that_start_together_one_makes_the_rows(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(4)
    others = [context.Process(target=_at_once, args=(tmp_path, tmp_path / "log", gate)) for _ in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join(30)
    lines = (tmp_path / "log").read_text().split()
    assert lines.count("made") == 1 and lines.count(fresh().fingerprint()) == 4


def test_the_default_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder(str(tmp_path)) == tmp_path
    monkeypatch.setenv("SALIENT_DS_CACHE", "/own")
    assert cache_folder(None) == Path("/own")
    monkeypatch.delenv("SALIENT_DS_CACHE")
    monkeypatch.setenv("HF_HOME", "/hf")
    assert cache_folder(None) == Path("/hf/salient_ds")
    monkeypatch.delenv("HF_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder(None) == Path.home() / ".cache" / "salient_ds"


def test_deleting_the_folder_is_allowed(tmp_path: Path) -> None:
    maker = Maker()
    rows = kept(tmp_path / "c", "key", "a.jsonl", 0, maker).rows
    shutil.rmtree(tmp_path / "c")
    assert rows.select(range(9)).fingerprint() == fresh().fingerprint()
    assert "tokenised" in kept(tmp_path / "c", "key", "a.jsonl", 0, maker).note
