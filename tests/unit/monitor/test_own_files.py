"""Files of a run directory: every flipped bit is found, and every reader names the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from salient_ds.monitor.directory import RunDirectory
from salient_ds.monitor.metrics import append_metrics, read_metrics, truncate_metrics
from salient_ds.own_files import (
    OwnFileError,
    mend_lines,
    read_lines,
    read_object,
    read_settings,
    reading,
    write_object,
    write_settings,
)

VALUES = {"finished": 24, "modules": ["a", "b"], "loss": 0.1 + 0.2, "none": None, "deep": {"x": [1, {"y": True}]}}


def flips(path: Path, read: Callable[[Path], Any]) -> list[int]:
    """Bytes of which some flipped bit changes what is read, without an error."""
    whole, expected = path.read_bytes(), read(path)
    silent = []
    for byte in range(len(whole)):
        for bit in (0, 2, 5):
            content = bytearray(whole)
            content[byte] ^= 1 << bit
            path.write_bytes(content)
            try:
                if read(path) != expected:
                    silent.append(byte)
            except OwnFileError as error:
                assert str(path) in str(error)
    path.write_bytes(whole)
    return silent


@pytest.mark.parametrize(("write", "read"), [(write_object, read_object), (write_settings, read_settings)])
def test_no_flipped_bit_is_silent(write: Any, read: Any, tmp_path: Path) -> None:
    """A key "sha256" that became another one is more than was written, but the rest is whole."""
    path = tmp_path / "run.json"
    write(path, VALUES)
    assert read(path) == VALUES
    assert flips(path, lambda place: {key: read(place).get(key) for key in VALUES}) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]


def test_no_flipped_bit_of_a_log_is_silent(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        append_metrics(path, {"step": step, "loss": 1.25 / step, "lr": 1e-4})
    rows = read_metrics(path)

    def read(place: Path) -> Any:
        found = [{key: row.get(key) for key in rows[0]} for row in read_metrics(place)]
        torn = not place.read_bytes().endswith(b"\n")  # as a crash leaves the last line
        return rows if torn and found == rows[:1] else found

    assert flips(path, read) == []


def test_metrics_name_the_broken_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    for step in range(1, 5):
        append_metrics(path, {"step": step, "loss": float("inf") if step == 2 else 1.0})
    assert [row["loss"] for row in read_metrics(path)] == [1.0, None, 1.0, 1.0]
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines) + '{"step": 5, "lo')
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]  # torn by a crash
    for broken in ("{]\n", "[1]\n", '{"loss": 1}\n', '{"step": -1}\n', '{"step": true}\n', "[" * 5000 + "\n", "\n",
                   '{"step": ' + "9" * 5000 + "}\n", '{"step": 2, "crc": "00000000"}\n'):  # fmt: skip
        path.write_text(lines[0] + lines[1] + broken + lines[3])
        for call in (read_metrics, lambda place: truncate_metrics(place, 1)):
            with pytest.raises(ValueError, match=r"metrics.jsonl, line 3 .*restore the file, or remove the line"):
                call(path)
    path.write_text('{"step": 1, "loss": 2.0}\n')  # of an older version
    assert read_lines(path) == [{"step": 1, "loss": 2.0}]


def test_damaged_lines_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 4):
        append_metrics(path, {"step": step})
    assert mend_lines(path) == [] and mend_lines(tmp_path / "none") == []
    damaged = path.read_text().replace('"step": 2', '"step": 7')
    path.write_text(damaged)
    (note,) = mend_lines(path)
    assert "line 2 does not have the CRC-32" in note and "kept as metrics.jsonl.damaged" in note
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    assert path.with_name("metrics.jsonl.damaged").read_text() == damaged


@pytest.mark.parametrize("left", [0, 1, 30, 75])
def test_an_end_of_zero_bytes_is_named(left: int, tmp_path: Path) -> None:
    """As a power failure leaves a file whose length was written before its content; a torn line is no damage."""
    path = tmp_path / "metrics.jsonl"
    for step in range(1, 4):
        append_metrics(path, {"step": step})
    content = path.read_bytes()
    path.write_bytes(content[:left] + bytes(len(content) - left))
    (note,) = mend_lines(path)
    assert "holds zero bytes to the end" in note and "kept as metrics.jsonl.damaged" in note
    assert [row["step"] for row in read_metrics(path)] == list(range(1, 1 + content[:left].count(b"\n")))
    path.write_bytes(content[:-5])
    assert mend_lines(path) == [] and [row["step"] for row in read_metrics(path)] == [1, 2]


@pytest.mark.parametrize("content", [
    b"", b"\xff", b"[]", b"{", b"5", b"[" * 99_999, b'{"a": ' + b"9" * 5000 + b"}", b"\0", b'{"a": "\\ud800"}',
    b"{" * 300 + b"}" * 300,
])  # fmt: skip
@pytest.mark.parametrize("read", [read_object, read_settings])
def test_content_that_is_not_ours(content: bytes, read: Any, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(OwnFileError, match=r"run.yaml is damaged .*--resume auto"):
        read(path)


def test_files_of_older_versions_and_changes_on_purpose(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: x}\n")
    assert read_settings(path) == {"model": {"path": "x"}}
    write_settings(path, {"model": {"path": "x"}})
    path.write_text(path.read_text().replace("path: x", "path: y"))
    with pytest.raises(OwnFileError, match="changed it on purpose, remove that line and the first one"):
        read_settings(path)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(OwnFileError, match=r"with the sha256, is missing: it was cut off.*remove the first line too"):
        read_settings(path)
    path.write_text("\n".join(path.read_text().splitlines()[1:]) + "\n")
    assert read_settings(path) == {"model": {"path": "y"}}
    with pytest.raises(OwnFileError, match=r"run.yaml is damaged .it lacks something: KeyError 'data'"), reading(path):
        read_settings(path)["data"]["train"]


def test_settings_that_were_cut_off_anywhere_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    settings = {"model": {"path": "x", "task": "causal-lm"}, "train": {"lr": 1e-3}, "speed": {"packing": "auto"}}
    write_settings(path, settings)
    whole = path.read_bytes()
    assert read_settings(path) == settings
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(OwnFileError):
            read_settings(path)


def test_a_run_is_finished_only_if_its_files_are_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    (tmp_path / ".run.yaml.new").write_text("debris")
    (tmp_path / ".adapter.a96e9ed7.new").mkdir()  # of a kill during the export
    (tmp_path / ".adapter.a96e9ed7.new" / "README.md").write_text("debris")
    run.write_resolved({"model": {}}, {}, {"processes": 1})
    assert not (tmp_path / ".run.yaml.new").exists() and not run.finished_at(5)
    write_object(run.summary, {"steps": 5})
    run.mark_finished(5)
    assert run.finished_at(5) and not run.finished_at(4)
    for name in ("run.yaml", "run.json", "summary.json"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        assert not run.finished_at(5)
        (tmp_path / name).write_bytes(whole)
    assert run.finished_at(5)
    assert json.loads((tmp_path / "ds_config.json").read_text()) == {}
