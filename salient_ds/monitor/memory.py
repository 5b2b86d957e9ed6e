"""The memory that this process uses, for the log."""

from __future__ import annotations

import os
from pathlib import Path


def memory_in_use() -> int:
    """Bytes: on CUDA the peak of tensors since the start, else what the process has in memory now (0: not known)."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return 0
