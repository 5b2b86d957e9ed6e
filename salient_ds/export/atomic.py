"""Directories that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

OVERWRITABLE = ("salient_ds.json", "adapter_config.json", "config.json", "evaluation.json")
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def atomic_directory(
    target: Path, overwrite: bool, needed_bytes: int = 0, protected: Sequence[Path | str] = ()
) -> Iterator[Path]:
    """Yield an empty sibling of ``target`` to write into; on success it becomes ``target``.

    The sibling is synced to disk, then renamed. On any error it is removed, and ``target`` stays as it was. A target
    with content is replaced only after the new directory is complete: it is renamed away, the new one is renamed to
    ``target``, and then the old one is deleted. A kill -9 leaves at most a hidden sibling ".NAME.*.new" (unfinished) or
    ".NAME.*.old" (the previous content).

    Args:
        needed_bytes: a lower bound of what will be written. Less free space is an error before work starts.
        protected: directories that overwriting must not touch (the base model, the run).

    Raises:
        ValueError: ``target`` is a file, is or contains a protected directory or the current one, or has content and
            either ``overwrite`` is off or the content does not look like an adapter or a model.
        OSError: errno ENOSPC when the disk is full. The message names the place and the state of the target.
    """
    target = target.resolve()
    check_target(target, overwrite, protected)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < needed_bytes:
        raise _disk_full(target, f"{needed_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
    unique = f".{target.name}.{uuid.uuid4().hex[:8]}"
    fresh = target.with_name(f"{unique}.new")
    try:
        fresh.mkdir()
        yield fresh
        _open_up(fresh)
        _sync_tree(fresh)
        _swap(fresh, target, target.with_name(f"{unique}.old"))
    except BaseException as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if _is_disk_full(error):
            raise _disk_full(target, str(error)) from error
        raise


def check_target(target: Path, overwrite: bool, protected: Sequence[Path | str] = ()) -> None:
    """Raise ValueError if :func:`atomic_directory` would refuse ``target``. This touches nothing."""
    target = target.resolve()
    for path in (Path(item).resolve() for item in protected if Path(item).is_dir()):
        if target == path or target in path.parents:
            raise ValueError(
                f"export target {str(target)!r} is or contains {str(path)!r}, which is still needed: "
                "choose another target"
            )
    here = Path.cwd()
    if target == here or target in here.parents:
        raise ValueError(
            f"export target {str(target)!r} is the current directory or contains it, and would be replaced under your "
            "feet: choose another target"
        )
    if target.exists() and not target.is_dir():
        raise ValueError(f"export target {str(target)!r} is a file: choose a directory")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"export target {str(target)!r} is not empty: choose another one, or overwrite it explicitly")
    if not any((target / name).is_file() for name in OVERWRITABLE):
        raise ValueError(
            f"export target {str(target)!r} holds neither an adapter nor a model (none of "
            f"{', '.join(OVERWRITABLE)}): it is not overwritten, remove it by hand if it is really meant"
        )


def _swap(fresh: Path, target: Path, aside: Path) -> None:
    filled = target.is_dir() and any(target.iterdir())
    if filled:
        target.rename(aside)
    try:
        fresh.rename(target)
    except BaseException:
        if filled:
            aside.rename(target)
        raise
    sync_path(target.parent)
    if filled:
        shutil.rmtree(aside, ignore_errors=True)


def _open_up(folder: Path) -> None:
    """Give all files the mode of a new file (0644 with the usual umask). safetensors creates its own with 0600."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(path.stat().st_mode & 0o777 | mode)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync_path(path)


def sync_path(path: Path) -> None:
    """fsync one file or directory. For a directory this syncs its list of entries, which makes a rename durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_disk_full(error: BaseException) -> bool:
    # safetensors reports I/O errors of its Rust side as text only
    if isinstance(error, OSError):
        return error.errno in _FULL
    found = re.search(r"os error (\d+)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return found is not None and int(found.group(1)) in _FULL


def _disk_full(target: Path, detail: str) -> OSError:
    state = "its previous content is untouched" if target.exists() else "nothing was left behind"
    return OSError(
        errno.ENOSPC,
        f"no space left to export to {str(target)!r} ({detail}); {state}: free some space and retry",
    )
