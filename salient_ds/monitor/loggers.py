"""Where a run is logged besides metrics.jsonl (``train.log``): CSV, TensorBoard, Weights & Biases, MLflow.

They belong to the run and not to a DeepSpeed engine, so they survive engines that are built anew. They count applied
steps. A run that is resumed goes on in the same file, or as the same run. Only the main process has loggers.
"""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from salient_ds.own_files import write_whole

log = logging.getLogger(__name__)
RUNS = "log_runs.json"
"""File in the run directory with the identifiers of its runs elsewhere: {"wandb": ..., "mlflow": ...}."""


class Logger(Protocol):
    """One place. Steps are applied optimizer steps."""

    def numbers(self, step: int, values: Mapping[str, float]) -> None: ...

    def ranks(self, step: int, ranks: Mapping[str, int]) -> None:
        """The rank of every matrix, by path."""
        ...

    def close(self) -> None: ...


class CsvLog:
    """``log.csv``: one header, one line per logged step. A number that was never there before gets a new column."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        self.path, self.columns = folder / "log.csv", ["step"]
        self.last: dict[str, Any] = {"step": -1}
        """The last line, which further numbers of its step still join."""
        self.before = 0
        """Bytes of the file in front of the last line."""
        rows: list[dict[str, Any]] = []
        if step and self.path.exists():
            columns, found = self._read()
            rows = [row for row in found if (row.get("step") or "").isdigit() and int(row["step"]) <= step]
            self.columns = list(dict.fromkeys(["step", *columns]))
        self._write(rows)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line, or add to the last one if it is of this step."""
        if any(key not in self.columns for key in values):
            rows = self._read()[1]
            self.columns += [key for key in values if key not in self.columns]
            self._write(rows[:-1] if rows and self.last["step"] != -1 else rows)
            if self.last["step"] != -1:
                self._append(self.last)
        if step == self.last["step"]:
            with self.path.open("r+b") as file:
                file.truncate(self.before)
            self._append({**self.last, **values})
        else:
            self._append({"step": step, **values})

    def ranks(self, step: int, ranks: Mapping[str, int]) -> None:
        """Nothing: allocations.jsonl has them."""

    def close(self) -> None:
        """Nothing: every line is on its way to the disk."""

    def _append(self, row: dict[str, Any]) -> None:
        self.last, self.before = row, self.path.stat().st_size
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        with self.path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            return list(reader.fieldnames or []), rows

    def _write(self, rows: list[dict[str, Any]]) -> None:
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, self.columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        with self.path.open("w", newline="", encoding="utf-8") as file:
            file.write(out.getvalue())


class TensorBoardLog:
    """Folder ``tensorboard`` of the run. Steps that are taken again replace the old ones."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)
        if not step:
            self.writer.add_text("run file", f"```json\n{json.dumps(settings, indent=2)}\n```", 0)

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def ranks(self, step: int, ranks: Mapping[str, int]) -> None:
        import numpy as np

        self.writer.add_histogram("ranks", np.array(list(ranks.values())), step)

    def close(self) -> None:
        self.writer.close()


class WandbLog:
    """A W&B run. Its project is WANDB_PROJECT, or salient_ds."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        import os

        import wandb

        self.wandb: Any = wandb
        self.run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "salient_ds"), name=folder.resolve().name, dir=str(folder),
            id=known_run(folder, "wandb") if step else None, resume="allow" if step else None, config=dict(settings),
        )  # fmt: skip
        remember_run(folder, "wandb", str(self.run.id))
        # an axis of our own: W&B's own steps may not go back, which those of a resumed run do
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log({"step": step, **values})

    def ranks(self, step: int, ranks: Mapping[str, int]) -> None:
        self.run.log({"step": step, "ranks": self.wandb.Histogram(list(ranks.values()))})

    def close(self) -> None:
        self.run.finish()


class MlflowLog:
    """An MLflow run. Its experiment is MLFLOW_EXPERIMENT_NAME, or salient_ds."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        import os

        from mlflow.tracking import MlflowClient

        self.client: Any = MlflowClient()
        self.id = known_run(folder, "mlflow") if step else None
        if self.id is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "salient_ds")
            found = self.client.get_experiment_by_name(name)
            experiment = found.experiment_id if found is not None else self.client.create_experiment(name)
            self.id = str(self.client.create_run(experiment, run_name=folder.resolve().name).info.run_id)
            self.client.log_dict(self.id, dict(settings), "run.json")
            remember_run(folder, "mlflow", self.id)
        else:
            self.client.update_run(self.id, status="RUNNING")

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self.client.log_metric(self.id, key, value, step=step)

    def ranks(self, step: int, ranks: Mapping[str, int]) -> None:
        self.client.log_dict(self.id, dict(ranks), f"ranks/step-{step:08d}.json")

    def close(self) -> None:
        self.client.set_terminated(self.id)


KINDS: dict[str, Callable[[Path, Mapping[str, Any], int], Logger]] = {
    "csv": CsvLog, "tensorboard": TensorBoardLog, "wandb": WandbLog, "mlflow": MlflowLog,
}  # fmt: skip
"""The values of ``train.log``. Each is made from the run directory, the resolved run file, and the step so far."""


class Loggers:
    """All loggers of a run. One that fails, as without a network, is left out from then on, with a warning."""

    def __init__(self, names: Sequence[str], folder: Path, settings: Mapping[str, Any], step: int) -> None:
        """
        Args:
            names: keys of :data:`KINDS`.
            step: applied steps so far; above 0 for a run that is resumed.
        """
        self.loggers: dict[str, Logger] = {}
        for name in dict.fromkeys(names):
            made = self._guarded(name, lambda name=name: KINDS[name](folder, settings, step))  # type: ignore[misc]
            if made is not None:
                self.loggers[name] = made

    def numbers(self, step: int, values: Mapping[str, Any]) -> None:
        """Log the finite numbers among ``values``."""
        plain = {k: v for k, v in values.items() if isinstance(v, int | float) and isfinite(v)}
        self._each(lambda logger: logger.numbers(step, plain))

    def ranks(self, step: int, ranks: Mapping[str, int]) -> None:
        """Log the rank of every matrix."""
        self._each(lambda logger: logger.ranks(step, ranks))

    def close(self) -> None:
        """Finish. Nothing may be logged afterwards."""
        self._each(lambda logger: logger.close())
        self.loggers.clear()

    def _each(self, work: Callable[[Logger], None]) -> None:
        for name, logger in list(self.loggers.items()):
            self._guarded(name, lambda logger=logger: work(logger))  # type: ignore[misc]

    def _guarded(self, name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except Exception as error:  # of other people's packages: training is worth more than its log
            self.loggers.pop(name, None)
            text = " ".join(str(error).split())[:300]
            log.warning("train.log: %s failed and is left out from here on: %s: %s", name, type(error).__name__, text)
            return None


def known_run(folder: Path, name: str) -> str | None:
    """The identifier of the run that an earlier start began elsewhere; None if there is none."""
    try:
        found = json.loads((folder / RUNS).read_text(encoding="utf-8")).get(name)
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def remember_run(folder: Path, name: str, identifier: str) -> None:
    """Store it for :func:`known_run`."""
    path = folder / RUNS
    known = {other: found for other in ("wandb", "mlflow") if (found := known_run(folder, other)) is not None}
    write_whole(path, json.dumps({**known, name: identifier}) + "\n")
