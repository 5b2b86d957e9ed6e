"""The event log survives crashes while writing and is cut back on resume."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from pydantic import ValidationError

from salient_ds.monitor.events import AllocationRecord, append_record, read_records, truncate_after


def record(step: int, **changes: object) -> AllocationRecord:
    values = {
        "step": step, "budget": 20, "total_rank": 19, "ranks": [7, 12, 0], "threshold": 0.25, "digest": "ab" * 32,
        "seconds_gather": 0.1, "seconds_solve": 0.2, "seconds_apply": 0.3, "changed": 5,
    }  # fmt: skip
    return AllocationRecord.model_validate({**values, **changes})


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "allocations.jsonl"
    for step in (10, 20, 30):
        append_record(path, record(step))
    return path


def test_round_trip(log: Path) -> None:
    assert read_records(log) == [record(10), record(20), record(30)]
    lines = log.read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[1])["ranks"] == [7, 12, 0]


def test_every_line_is_forced_to_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen = tmp_path / "a.jsonl", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(path.read_bytes().count(b"\n")), fsync(handle)))
    append_record(path, record(1))
    append_record(path, record(2))
    assert seen == [1, 1, 2]  # the line, the new file's folder entry, the second line: always after the write


@pytest.mark.parametrize("threshold", [math.nan, math.inf, -math.inf])
def test_thresholds_without_a_value_are_null(tmp_path: Path, threshold: float) -> None:
    append_record(tmp_path / "a", record(1, threshold=threshold))
    assert '"threshold": null' in (tmp_path / "a").read_text()
    assert read_records(tmp_path / "a")[0].threshold is None


def test_torn_last_line_is_ignored_and_removed_by_the_next(log: Path) -> None:
    whole = log.read_bytes()
    last = len(whole.splitlines()[-1]) + 1
    for cut in range(1, last):
        log.write_bytes(whole[:-cut])
        assert [r.step for r in read_records(log)] == [10, 20]
    append_record(log, record(31))
    assert [r.step for r in read_records(log)] == [10, 20, 31]


def test_damage_elsewhere_is_an_error(log: Path) -> None:
    lines = log.read_text().splitlines(keepends=True)
    log.write_text(lines[0] + lines[1][:40] + "\n" + lines[2])
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_records(log)
    log.write_text(lines[0].replace('"step"', '"stepp"'))
    with pytest.raises(ValueError, match="line 1 is no JSON object with a step"):
        read_records(log)
    log.write_text(lines[0].replace("19,", "18,"))
    with pytest.raises(ValueError, match="line 1 does not have the CRC-32 that it states"):
        read_records(log)
    log.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="line 1 is not an allocation record .budget: Field required"):
        read_records(log)


@pytest.mark.parametrize(
    ("step", "kept"), [(5, []), (10, [10]), (29, [10, 20]), (30, [10, 20, 30]), (99, [10, 20, 30])]
)
def test_truncate_after(log: Path, step: int, kept: list[int]) -> None:
    assert truncate_after(log, step) == 3 - len(kept)
    assert [r.step for r in read_records(log)] == kept
    assert list(log.parent.iterdir()) == [log]


def test_truncate_drops_a_torn_line_and_may_find_no_file(log: Path) -> None:
    log.write_bytes(log.read_bytes() + b'{"step": 40')
    assert truncate_after(log, 30) == 0
    assert log.read_bytes().endswith(b"}\n")
    assert truncate_after(log.with_name("none"), 3) == 0 and not log.with_name("none").exists()


def test_truncate_is_all_or_nothing(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = log.read_bytes()

    def crash(handle: int) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match="power cut"):
        truncate_after(log, 10)
    assert log.read_bytes() == before


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(ValidationError, match="extra"):
        record(1, surprise=1)
