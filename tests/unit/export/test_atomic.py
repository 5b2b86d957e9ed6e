"""A target is whole or as it was: on errors, on a full disk, on overwriting."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from salient_ds.export import atomic
from salient_ds.export.api import export_adapter
from salient_ds.export.atomic import atomic_directory
from tests.unit.export.builders import Case


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with atomic_directory(target, overwrite=False) as folder:
        (folder / "x").write_text("1")
        assert not target.exists() and folder.parent == target.parent
    assert content(target) == {"x": b"1"} and names(target.parent) == ["b"]


@pytest.mark.parametrize("error", [RuntimeError("bad"), KeyboardInterrupt()])
def test_error_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_directory(tmp_path / "t", overwrite=False) as folder:
        (folder / "x").write_text("1")
        raise error
    assert names(tmp_path) == []


def filled(folder: Path) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text("old")
    return folder


def test_filled_target_needs_overwrite(tmp_path: Path) -> None:
    target = filled(tmp_path / "t")
    with pytest.raises(ValueError, match="is not empty"), atomic_directory(target, overwrite=False):
        pytest.fail("entered")
    with atomic_directory(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
        assert content(target) == {"adapter_config.json": b"old"}, "replaced only after the new one is complete"
    assert content(target) == {"new": b"new"} and names(tmp_path) == ["t"]


def test_failed_overwrite_keeps_the_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = filled(tmp_path / "t")
    with pytest.raises(RuntimeError), atomic_directory(target, overwrite=True):
        raise RuntimeError
    assert content(target) == {"adapter_config.json": b"old"}
    rename = Path.rename

    def fail_second(self: Path, to: Path) -> Path:
        if self.name.endswith(".new"):
            raise OSError(errno.EIO, "broken disk")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail_second)
    with pytest.raises(OSError, match="broken disk"), atomic_directory(target, overwrite=True):
        pass
    assert content(target) == {"adapter_config.json": b"old"} and names(tmp_path) == ["t"]


def test_only_exports_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match="neither an adapter nor a model"), atomic_directory(tmp_path / "home", True):
        pytest.fail("entered")
    with pytest.raises(ValueError, match="is a file"), atomic_directory(tmp_path / "home" / "thesis.tex", True):
        pytest.fail("entered")


def test_empty_target_is_filled(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    with atomic_directory(tmp_path / "t", overwrite=False) as folder:
        (folder / "x").write_text("1")
    assert content(tmp_path / "t") == {"x": b"1"}


def test_the_current_directory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renaming it would leave the user's shell in a directory that is gone."""
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    for here in ("empty", "empty/inner"):
        monkeypatch.chdir(tmp_path / here)
        with (
            pytest.raises(ValueError, match="empty' is the current directory or contains it"),
            atomic_directory(tmp_path / "empty", overwrite=True),
        ):
            pass
    assert names(tmp_path) == ["empty"]


def test_too_little_space_is_said_before(tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match=r"\d+\.\d\d GB needed") as caught,
        atomic_directory(tmp_path / "t", False, 1 << 60),
    ):
        pytest.fail("entered")
    assert caught.value.errno == errno.ENOSPC and names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of three pages, smaller than any form of the tiny LLaMA's export."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small tmpfs needs root")
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12k", "none", place], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("early", [True, False], ids=["noticed_before", "while_writing"])
@pytest.mark.parametrize("form", ["peft", "padded", "merged"])
def test_full_disk(llama: Case, small_disk: Path, monkeypatch: pytest.MonkeyPatch, form: str, early: bool) -> None:
    if not early:  # the check before the work knows nothing of quotas and of other writers
        monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 50, 0, 1 << 50))
    target = filled(small_disk / "adapter")
    with pytest.raises(OSError, match="no space left to export to .*previous content is untouched") as caught:
        export_adapter(llama.factors, llama.meta, target, form, llama.base, overwrite=True)
    assert caught.value.errno == errno.ENOSPC and ("GB needed" in str(caught.value)) == early
    assert names(small_disk) == ["adapter"] and content(target) == {"adapter_config.json": b"old"}


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_full_disk_without_root(llama: Case, out: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic, "sync_path", full)
    with pytest.raises(OSError, match="nothing was left behind: free some space"):
        export_adapter(llama.factors, llama.meta, out, form, llama.base)
    assert names(out.parent) == []
