"""Pre-flight checks of the run directory and of its disk. No torch."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

from salient_ds.check.memory import GIB
from salient_ds.check.report import Report
from salient_ds.config.run import RunConfig
from salient_ds.monitor.directory import OWN_FILES


def check_directory(run: RunConfig, report: Report) -> None:
    """Check whether the run may write to its output directory. This touches nothing."""
    path = Path(run.output_dir).expanduser()
    if path.exists() and not path.is_dir():
        report.problems.append(f"output_dir={str(path)!r} is a file: choose another path")
        return
    present = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    held = [name for name in present if name != ".lock"]
    if ".lock" in present and _is_locked(path / ".lock"):
        owner = (path / ".lock").read_text().strip() or "another process"
        report.problems.append(f"output_dir={str(path)!r} is in use by {owner}: wait, or choose another")
    elif held and not set(held) & set(OWN_FILES):
        report.problems.append(
            f"output_dir={str(path)!r} is not a run directory (it holds {_some(held)}): choose another one"
        )
    elif held:
        steps = sorted(p.name for p in (path / "checkpoints").glob("step-*") if not p.name.endswith(".partial"))
        last = f", last checkpoint {steps[-1]}" if steps else ", no checkpoint"
        note = (
            f"output_dir={str(path)!r} already holds a run ({_some(held)}{last}): start with --resume auto to "
            "continue it or --overwrite to replace it"
        )
        report.notes.append(note)
        report.facts["used_directory"] = note


def check_disk(run: RunConfig, report: Report) -> None:
    """Check whether the checkpoints fit on the disk."""
    folder = Path(run.output_dir).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    report.facts["free_bytes"] = free
    size, train = report.facts.get("checkpoint_bytes"), run.train
    if size is None:
        return
    steps = train.save_steps
    saves = 1 + (report.facts.get("total_steps", 0) // steps if steps else 0)
    most = train.keep_checkpoints + 1  # the oldest is deleted after a new one is complete
    copies = min(saves, most)
    if size * copies > free:
        report.problems.append(_too_full(size, copies, folder, free))
    elif train.save_seconds and size * most > free:
        report.notes.append(f"if the run takes longer than train.save_every={train.save_every}: "
                            + _too_full(size, most, folder, free))  # fmt: skip


def _too_full(size: float, copies: int, folder: Path, free: int) -> str:
    return (
        f"output_dir needs about {size * copies / GIB:.1f} GiB for {copies} checkpoints of {size / GIB:.1f} GiB, but "
        f"{folder} has {free / GIB:.1f} GiB free: free some, or lower train.keep_checkpoints"
    )


def _is_locked(path: Path) -> bool:
    with path.open("r") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
