"""Keeps messages that are not for the user off the screen: in a file of the run that the main process names.

Hidden are warnings from one library to another (deprecations, and what setuptools says while something is compiled).
Errors and all other warnings are shown as ever. Loading bars are shown by the main process only.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

FOLDER = "messages"
"""In the run directory: one file per process, "0.log" for the main one."""
_KINDS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
_BUILDERS = ("setuptools", "pkg_resources", "distutils")
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CUDA_VISIBLE_DEVICES")


class Messages:
    """What this process keeps off the screen. Before there is a file, it is held in memory."""

    def __init__(self, global_rank: int) -> None:
        self.global_rank = global_rank
        self.count = 0
        """Messages so far."""
        self.path: Path | None = None
        self._held: list[str] = []
        self._shown = warnings.showwarning

    def listen(self) -> None:
        """Begin. Warnings that are shown go on to whoever showed them before."""
        self._shown, warnings.showwarning = warnings.showwarning, self._take

    def close(self) -> None:
        """Show everything again."""
        warnings.showwarning = self._shown

    def keep_in(self, run: Path) -> None:
        """From now on write into the folder ``messages`` of the run directory; first what was held so far.

        A folder that cannot be written costs the messages, not the run.
        """
        folder = run / FOLDER
        self.path = folder / f"{self.global_rank}.log"
        described = " ".join(f"{name}={os.environ[name]}" for name in _LAUNCHED if name in os.environ)
        held, self._held = [f"started as {' '.join(sys.argv)}\n{described}\n", *self._held], []
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
        for text in held:
            self._write(text)

    def note(self) -> str | None:
        """One line that names the file, if anything is in it that was not shown."""
        if not self.count or self.path is None:
            return None
        what = "a warning" if self.count == 1 else f"{self.count} warnings"
        return f"{what} of one library to another, kept off the screen: {self.path}"

    def _take(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if file is not None or not _is_between_libraries(category, filename):
            self._shown(message, category, filename, lineno, file, line)
            return
        self.count += 1
        text = warnings.formatwarning(message, category, filename, lineno, line)
        if self.path is None:
            self._held.append(text)
        else:
            self._write(text)

    def _write(self, text: str) -> None:
        assert self.path is not None
        with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as out:
            out.write(text)


def leave_bars_to_main(global_rank: int) -> None:
    """Show no loading bars of other packages on processes besides the main one."""
    if global_rank == 0:
        return
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # read when the package is imported
    os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
    from transformers.utils import logging

    logging.disable_progress_bar()


def _is_between_libraries(category: type[Warning], filename: str) -> bool:
    """Whether a warning is about how one installed package uses another, or comes from a build tool."""
    parts = Path(filename).parts
    installed = "site-packages" in parts or "dist-packages" in parts
    builder = category.__module__.split(".")[0] in _BUILDERS or any(part in _BUILDERS for part in parts)
    return installed and (builder or issubclass(category, _KINDS))
