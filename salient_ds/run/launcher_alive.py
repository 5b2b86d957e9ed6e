"""Whether the launcher that started this process still lives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

_NAMES = ("deepspeed", "torchrun", "torch.distributed.run", "mpirun", "mpiexec", "orted", "prted", "prterun",
          "hydra_pmi", "slurmstepd")  # fmt: skip
"""How the name of a program or module of a launcher begins."""


@dataclass(frozen=True)
class Launcher:
    """Processes above this one that started it to train, the nearest first. Empty: a shell or a person started it."""

    pids: tuple[int, ...]

    @classmethod
    def of_this_process(cls) -> Launcher:
        """Find them: DeepSpeed has two, one that reads the hostfile and one per node."""
        found: list[int] = []
        pid = os.getppid()
        while pid > 1 and len(found) < 4 and _launches(pid):
            found.append(pid)
            pid = _parent(pid)
        return cls(tuple(found))

    def gone(self) -> bool:
        """Whether any of them has ended: then its child has another parent, at latest when it is waited for."""
        return any(above != _parent(below) for below, above in zip((os.getpid(), *self.pids), self.pids, strict=False))


def _launches(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:4]
    except (OSError, ValueError):
        return False
    return any(Path(word).name.startswith(_NAMES) for word in words)


def _parent(pid: int) -> int:
    """The parent of a process; 0 if it has ended."""
    if pid == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except (OSError, IndexError, ValueError):
        return 0
