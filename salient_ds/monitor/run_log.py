"""What a run leaves behind besides weights: metrics, allocation events, monitor backends, pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import Any

from salient_ds.monitor.directory import RunDirectory
from salient_ds.monitor.events import AllocationRecord, append_record, check_record, read_records, truncate_after
from salient_ds.monitor.heatmap import save_rank_png
from salient_ds.monitor.loggers import Loggers
from salient_ds.monitor.memory import memory_in_use
from salient_ds.monitor.metrics import append_metrics, truncate_metrics
from salient_ds.monitor.plots import save_history_png
from salient_ds.monitor.progress import Progress
from salient_ds.own_files import mend_lines
from salient_ds.zero.internals.engine_state import has_monitors, write_monitors
from salient_ds.zero.internals.monitors import continue_csv


class RunLog:
    """Writes a run's logs and plots. Metrics and events are written by the main process only.

    ``engine`` is an :class:`~salient_ds.engine.engine.AllocatingEngine`.
    """

    def __init__(self, directory: RunDirectory, engine: Any, every: int, main: bool) -> None:
        self.directory, self.engine, self.every, self.main = directory, engine, every, main
        self.loggers = Loggers((), directory.path, {}, 0)

    def open_loggers(self, names: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Begin logging to the places of ``train.log``, or go on there. ``settings`` is the resolved run file."""
        if self.main:
            self.loggers = Loggers(names, self.directory.path, settings, self.engine.step)
            if self.engine.step:
                continue_csv(self.engine.engine)

    def close(self) -> None:
        """Finish the places of ``train.log``."""
        self.loggers.close()

    def rewind(self, step: int) -> list[str]:
        """Drop the lines after ``step``, because these steps are taken again, and damaged lines.

        Returns:
            A sentence for each damaged line.
        """
        if not self.main:
            return []
        notes = mend_lines(self.directory.allocations, check_record) + mend_lines(self.directory.metrics)
        truncate_after(self.directory.allocations, step)
        truncate_metrics(self.directory.metrics, step)
        return notes

    def step(
        self, report: Any, tokens: int, counters: Any, seconds: float, lr: float, last: bool,
        mfu: float | None = None,
    ) -> None:  # fmt: skip
        """Log one applied step. ``report`` is a :class:`~salient_ds.engine.reports.StepReport`.

        Args:
            tokens: tokens of this step.
            counters: :class:`~salient_ds.run.counters.Counters` of the run so far.
            seconds: duration of this step.
            lr: learning rate of the factors in this step.
            last: whether this is the last step of the run; it is always logged.
            mfu: model FLOPs utilisation of the main process' device in this step, from 0 to 1; None: not known.
        """
        engine, total = self.engine, self.engine.decisions.latest.total
        if has_monitors(engine.engine):
            values = {"Train/loss": report.loss, "Train/total_rank": total}
            if report.penalty is not None:
                values["Train/orthogonality"] = report.penalty
            write_monitors(engine.engine, values)
        if not self.main:
            return
        if engine.step % self.every == 0 or report.event is not None or last:
            values = {
                "loss": report.loss, "grad_norm": report.grad_norm, "penalty": report.penalty, "total_rank": total,
                "tokens": counters.tokens, "skipped_steps": counters.skipped, "seconds": seconds,
                "tokens_per_second": tokens / seconds, "lr": lr, "memory": memory_in_use(),
            }  # fmt: skip
            values |= {} if mfu is None else {"mfu": mfu}
            append_metrics(self.directory.metrics, {"step": engine.step, **values})
            self.loggers.numbers(engine.step, values)
        if report.event is not None:
            self._event(report.event)

    def _event(self, event: Any) -> None:
        decision = event.decision
        record = AllocationRecord(
            step=decision.step, budget=decision.budget, total_rank=decision.total,
            ranks=list(event.ranks), threshold=decision.threshold, digest=decision.digest(),
            seconds_gather=event.gather, seconds_solve=event.solve, seconds_apply=event.apply, changed=event.changed,
        )  # fmt: skip
        append_record(self.directory.allocations, record)
        took = {"gather": event.gather, "solve": event.solve, "apply": event.apply}
        spent = {f"event/seconds_{part}": seconds for part, seconds in took.items()}
        self.loggers.numbers(
            self.engine.step, {"event/budget": decision.budget, "event/changed": event.changed, **spent}
        )
        self.loggers.ranks(self.engine.step, dict(zip(self.engine.initial_layout.modules, event.ranks, strict=True)))

    def evaluation(self, values: Mapping[str, float]) -> None:
        """Log the held-out loss and metrics at this step, by name."""
        write_monitors(self.engine.engine, {f"Eval/{name}": value for name, value in values.items()})
        if self.main:
            named = {f"eval_{name}": value if isfinite(value) else None for name, value in values.items()}
            append_metrics(self.directory.metrics, {"step": self.engine.step, **named})
            self.loggers.numbers(self.engine.step, named)

    def summary(self, progress: Progress, **more: Any) -> None:
        """Write the totals of the training loop, and ``more``."""
        progress.write_summary(self.directory.summary, **more)

    def pictures(self) -> None:
        """Draw the rank heat map, and the ranks over the events."""
        layout, latest = self.engine.initial_layout, self.engine.decisions.latest
        ranks = dict(zip(layout.modules, latest.ranks(self.engine.adapted.layout), strict=True))
        save_rank_png(ranks, self.directory.path / "ranks.png", top=max(layout.ranks))
        if self.directory.allocations.exists():
            records = read_records(self.directory.allocations)
            target = self.directory.path / "allocations.png"
            save_history_png(records, layout.modules, target, layout.ranks, self.engine.step)
