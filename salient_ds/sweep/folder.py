"""The folder of a sweep: what it was started with, its queue, the runs and their outcomes.

OUTPUT_DIR/spec.json              arms as they were run, digests of their files
OUTPUT_DIR/runs/ARM/lr-X/         seed-N.yaml (run file), seed-N.log, seed-N/ (run directory)
OUTPUT_DIR/queue/claims/          who works on what (salient_ds.sweep.queue)
OUTPUT_DIR/queue/outcomes/        one JSON file per run that ended
OUTPUT_DIR/queue/marks/           training losses on the way, for early stops
OUTPUT_DIR/sweep.json, results.csv, report.html
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from salient_ds.strict import ConfigError
from salient_ds.sweep.arms import differences
from salient_ds.sweep.plan import Job, Outcome
from salient_ds.sweep.queue import LEASE, Queue
from salient_ds.sweep.spec import lr_text

FORMAT = 1


class SweepFolder:
    """Paths and records of one sweep."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().resolve()
        self.spec_file = self.path / "spec.json"
        self.outcome_folder = self.path / "queue" / "outcomes"
        self.mark_folder = self.path / "queue" / "marks"
        self._read: dict[str, tuple[int, Outcome]] = {}

    def run_directory(self, job: Job) -> Path:
        return self.path / "runs" / job.arm / f"lr-{lr_text(job.lr)}" / f"seed-{job.seed}"

    def run_file(self, job: Job) -> Path:
        return self.run_directory(job).with_suffix(".yaml")

    def log_file(self, job: Job) -> Path:
        return self.run_directory(job).with_suffix(".log")

    def queue(self, lease: float = LEASE) -> Queue:
        return Queue(self.path / "queue" / "claims", lease, str(self.saved().get("session", "")))

    def saved(self) -> dict[str, Any]:
        """What the sweep was started with: "format", "arms" (fingerprints), "session"; empty before the first start.

        Raises:
            ConfigError: the file is damaged or of another version.
        """
        if not self.spec_file.exists():
            return {}
        try:
            found: dict[str, Any] = json.loads(self.spec_file.read_text())
            if found["format"] != FORMAT:
                raise ValueError(f"format {found['format']!r}, this version writes {FORMAT}")
            assert isinstance(found["arms"], dict)
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            raise ConfigError(
                [f"{self.spec_file} cannot be read ({error}): restore it, or choose another output_dir"]
            ) from error
        return found

    def changed_arms(self, arms: Mapping[str, Any]) -> dict[str, list[str]]:
        """Arms that were run otherwise than ``arms`` (fingerprints) say, with the differences."""
        before = self.saved().get("arms", {})
        found = {name: differences(before[name], now) for name, now in arms.items() if name in before}
        return {name: lines for name, lines in found.items() if lines}

    def problems(self) -> list[str]:
        """Why the folder cannot be used, at most one sentence. Touches nothing."""
        if self.path.exists() and not self.path.is_dir():
            return [f"output_dir={str(self.path)!r} is a file: choose another path"]
        present = sorted(p.name for p in self.path.iterdir() if p.name != ".lock") if self.path.is_dir() else []
        if present and not self.spec_file.exists():
            return [
                f"output_dir={str(self.path)!r} is not the folder of a sweep (it holds {', '.join(present[:3])}): "
                "choose another one"
            ]
        return []

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only process that leads this sweep. The kernel frees the lock when the process ends.

        Raises:
            ConfigError: another process leads it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / ".lock", "a+") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                handle.seek(0)
                owner = handle.read().strip() or "another process"
                raise ConfigError(
                    [f"{self.path} is led by {owner}: wait for it, stop it, or add a process with --worker"]
                ) from error
            handle.seek(0)
            handle.truncate()
            handle.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            handle.flush()
            yield

    def begin(self, arms: Mapping[str, Any], replaced: Collection[str], again: Collection[str]) -> None:
        """Record what the sweep is started with, and open a new session.

        Args:
            arms: fingerprints. Arms of earlier starts that are not among them stay recorded.
            replaced: arms whose runs are deleted.
            again: statuses whose runs are tried again; their files are kept.
        """
        for folder in (self.outcome_folder, self.mark_folder):
            folder.mkdir(parents=True, exist_ok=True)
        for name in replaced:
            shutil.rmtree(self.path / "runs" / name, ignore_errors=True)
            for folder in (self.outcome_folder, self.mark_folder, self.path / "queue" / "claims"):
                for path in folder.glob(f"{name}~*") if folder.is_dir() else ():
                    path.unlink(missing_ok=True)
        for outcome in self.outcomes().values():
            if outcome.status in again:
                (self.outcome_folder / f"{outcome.key}.json").unlink()
        kept = {name: value for name, value in self.saved().get("arms", {}).items() if name not in arms}
        state = {"format": FORMAT, "session": secrets.token_hex(8), "arms": kept | dict(arms)}
        write_whole(self.spec_file, json.dumps(state, indent=2) + "\n")

    def outcomes(self) -> dict[str, Outcome]:
        """All outcomes by key of the run. A file that is not whole yet is left out."""
        found = {}
        for entry in os.scandir(self.outcome_folder) if self.outcome_folder.is_dir() else ():
            if not entry.name.endswith(".json"):
                continue
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                changed = entry.stat().st_mtime_ns
                if self._read.get(entry.name, (None,))[0] != changed:
                    self._read[entry.name] = changed, Outcome.from_json(json.loads(Path(entry.path).read_text()))
                found[entry.name.removesuffix(".json")] = self._read[entry.name][1]
        return found

    def put(self, outcome: Outcome) -> bool:
        """Record how a run ended. Returns False if another process has recorded it before."""
        path = self.outcome_folder / f"{outcome.key}.json"
        draft = self.outcome_folder / f".{secrets.token_hex(8)}"
        draft.write_text(json.dumps(outcome.to_json(), allow_nan=False) + "\n")
        try:
            os.link(draft, path)
        except FileExistsError:
            if outcome.key in self.outcomes():
                return False
            draft.replace(path)  # what was there is damaged
        finally:
            draft.unlink(missing_ok=True)
        return True

    def log_tail(self, job: Job, lines: int = 5) -> list[str]:
        """The last lines of a run's log, as far as there is one."""
        try:
            with open(self.log_file(job), "rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - 20000))
                text = file.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()][-lines:]


def write_whole(path: Path, text: str) -> None:
    """Write a file all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.new")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
