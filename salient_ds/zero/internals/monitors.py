"""DeepSpeed's own monitors (sections tensorboard, wandb, csv_monitor, comet of the ZeRO JSON): one set per run.

DeepSpeed makes them with an engine. A run that resizes its adapters builds several engines, and each of them would
begin a second TensorBoard file, a second W&B run, and CSV files with a second header.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def monitors_of(engine: Any) -> Any:
    """What an engine logs to, for :func:`keeping_monitors`."""
    return engine.monitor


@contextmanager
def keeping_monitors(monitors: Any) -> Iterator[None]:
    """Engines that are built in the block log to ``monitors``, and begin none of their own."""
    import deepspeed.runtime.engine as place

    made = place.MonitorMaster
    place.MonitorMaster = lambda config: monitors
    try:
        yield
    finally:
        place.MonitorMaster = made


def continue_csv(engine: Any) -> None:
    """Let CSV files of an earlier start of the run go on: no second header, and no rows that are written again.

    Rows count samples. Those after the engine's own number of samples are dropped.
    """
    writer = getattr(engine.monitor, "csv_monitor", None)
    if writer is None:
        return
    for path in sorted(Path(writer.log_dir).glob("*.csv")):
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        kept = rows[:1] + [row for row in rows[1:] if row and row[0].isdigit() and int(row[0]) <= engine.global_samples]
        if not kept:
            continue
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(kept)
        writer.filenames.append(path.stem)
