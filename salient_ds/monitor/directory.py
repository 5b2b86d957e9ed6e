"""The directory of one run: its files, and the lock that lets one run at a time write to it."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from salient_ds.own_files import read_object, read_settings, write_object, write_settings, write_whole
from salient_ds.strict import Reported

OWN_FILES = ("run.yaml", "ds_config.json", "allocations.jsonl", "allocations.png", "metrics.jsonl", "run.json",
             "checkpoints", "adapter", "evaluation", "search", "ranks.png", "summary.json", "report.html",
             "log.csv", "log_runs.json", "tensorboard", "wandb", "monitor", "messages", ".shared",
             "allocations.jsonl.damaged", "metrics.jsonl.damaged", ".lock")  # fmt: skip


class RunDirectoryError(RuntimeError, Reported):
    """The run directory cannot be used as asked. The message says what is in it and what to do."""


@dataclass
class RunDirectory:
    """Paths of a run. Only the main process opens it, by :func:`claim`."""

    path: Path
    _lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def search(self) -> Path:
        """Folder with the results of HeteroLoRA's search."""
        return self.path / "search"

    @property
    def allocations(self) -> Path:
        return self.path / "allocations.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    def write_resolved(self, run: dict[str, Any], ds_config: dict[str, Any], facts: dict[str, Any]) -> None:
        """Save what this run really uses: its configuration, the DeepSpeed JSON, and facts found at the start.

        The run counts as unfinished afterwards.
        """
        for debris in self.path.glob(".*.new"):  # of a process that was killed while it wrote, or exported
            if debris.is_dir():
                shutil.rmtree(debris, ignore_errors=True)
            else:
                debris.unlink(missing_ok=True)
        write_settings(self.path / "run.yaml", run)
        write_whole(self.path / "ds_config.json", json.dumps(ds_config, indent=2) + "\n")
        write_object(self.path / "run.json", facts | {"finished": None})

    def mark_finished(self, step: int) -> None:
        """Note that everything which follows the last step ``step`` is there too: adapter, pictures, results."""
        write_object(self.path / "run.json", read_object(self.path / "run.json") | {"finished": step})

    def finished_at(self, step: int) -> bool:
        """Whether the run went to its end with step ``step``, and what it says about itself is whole."""
        try:
            facts = read_object(self.path / "run.json")
            read_settings(self.path / "run.yaml")
            read_object(self.summary)
        except (OSError, ValueError):
            return False
        if "finished" in facts:
            return bool(facts["finished"] == step)
        # of an older version, which left no mark
        return (self.adapter / "salient_ds.json").is_file() and self.summary.is_file()

    def close(self) -> None:
        """Unlock the directory before the process ends. Nothing may be written to it afterwards."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def claim(path: Path, resume: Literal["never", "auto"] | str, overwrite: bool) -> RunDirectory:
    """Lock the directory for this process, and create it if it does not exist.

    The kernel frees the lock when the process ends, also after kill -9.

    Args:
        resume: "never" refuses or overwrites an earlier run. Anything else leaves its files in place.
        overwrite: with "never", delete the files of an earlier run.

    Raises:
        RunDirectoryError: ``path`` is a file, is not a run directory, is in use by another run, or holds an earlier run
            that is neither resumed nor overwritten.
    """
    if path.exists() and not path.is_dir():
        raise RunDirectoryError(f"output_dir {path} is a file: choose another path")
    present = sorted(p.name for p in path.iterdir() if p.name not in (".lock", ".shared")) if path.is_dir() else []
    foreign = [name for name in present if name not in OWN_FILES]
    if present and "run.yaml" not in present and foreign:
        raise RunDirectoryError(
            f"output_dir {path} is not a run directory (it holds {', '.join(foreign[:3])}): choose another one"
        )
    path.mkdir(parents=True, exist_ok=True)
    run = RunDirectory(path, _take_lock(path))
    if present and resume == "never":
        if not overwrite:
            raise RunDirectoryError(
                f"output_dir {path} already holds a run ({', '.join(present[:4])}): continue it with --resume auto, "
                "replace it with --overwrite, or choose another output_dir"
            )
        _remove_own(path)
    return run


def _take_lock(path: Path) -> IO[str]:
    handle = open(path / ".lock", "a+")  # noqa: SIM115 - held until the process ends
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        owner = handle.read().strip() or "another process"
        raise RunDirectoryError(
            f"output_dir {path} is in use by {owner}: wait for it, stop it, or choose another output_dir"
        ) from error
    handle.seek(0)
    handle.truncate()
    handle.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    handle.flush()
    return handle


def _remove_own(path: Path) -> None:
    for name in OWN_FILES:
        target = path / name
        if name == ".lock":
            continue
        if target.is_dir():
            shutil.rmtree(target)
        elif target.exists():
            target.unlink()


def shared_by_all(path: Path, is_main: bool, token: str) -> bool:
    """Whether this process sees the file that the main process wrote. On several nodes the directory must be shared."""
    marker = path / ".shared"
    if is_main:
        marker.write_text(token)
        return True
    try:
        return marker.read_text() == token
    except OSError:
        return False
