"""Counts, reads and renders the rows of a run's data, for ``salient-ds check``. No torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from salient_ds.check.model_files import inspect_model
from salient_ds.check.rendered_rows import rendered
from salient_ds.check.report import Report
from salient_ds.check.task_rows import task_rows
from salient_ds.check.tokenizer_files import has_chat_template
from salient_ds.config.run import RunConfig
from salient_ds.data.shares import held_out_counts, share_of

Guard = Callable[[Callable[[], None]], None]
"""Runs a check; what it raises becomes a problem of the report."""


class DataRows:
    """The checks of section ``data``. Facts: rows (of an epoch, without those held out), eval_rows or held_out_rows,
    and sets (of several data sets: path, weight, rows, held_out, per_epoch)."""

    def __init__(self, run: RunConfig, quick: bool, report: Report, guarded: Guard) -> None:
        """
        Args:
            quick: count rows without validating them, and start no other process.
        """
        self.run, self.quick, self.report, self.guarded = run, quick, report, guarded

    def check(self) -> None:
        """Check training data, held-out data, and what is held out of the one for the other."""
        data, facts = self.run.data, self.report.facts
        if data.task is not None:
            self.report.problems += data.task.library_problems()
        counts: list[int | None] = []
        for one in data.sets:
            self.guarded(lambda one=one: counts.append(self._rows("train", one.path, one.format or data.format)))  # type: ignore[misc]
        if data.eval is not None:
            self.guarded(lambda: self._eval_rows(str(data.eval)))
        elif not data.eval_size and self.run.train.eval_every:
            self.report.problems.append(
                f"train.eval_every={self.run.train.eval_every}, but there is no held-out data: set data.eval or "
                "data.eval_size, or eval_every to 0"
            )
        known = [count for count in counts if count is not None]
        if len(known) < len(data.sets):
            return  # a set is loaded by name, or has problems
        held_out = self._held_out(known) if data.eval is None and data.eval_size else [0] * len(known)
        if sum(held_out):
            facts["held_out_rows"] = sum(held_out)
        shares = [
            share_of(rows - taken, one.weight) for rows, taken, one in zip(known, held_out, data.sets, strict=True)
        ]
        facts["rows"] = sum(share.per_epoch for share in shares)
        if not isinstance(data.train, str):
            facts["sets"] = [
                {"path": one.path, "weight": one.weight, "rows": share.rows, "held_out": taken,
                 "per_epoch": share.per_epoch}
                for one, share, taken in zip(data.sets, shares, held_out, strict=True)
            ]  # fmt: skip

    def _held_out(self, rows: list[int]) -> list[int]:
        """Rows held out of each set; none, and a problem, if they cannot be."""
        size = self.run.data.eval_size
        if len(rows) == 1:
            held_out = int(size) if size >= 1 else round(size * rows[0])
            if 0 < held_out < rows[0]:
                return [held_out]
            self.report.problems.append(
                f"data.eval_size={size:g} holds out {held_out} of {rows[0]} rows: at least one has to be on either "
                f"side, give 1 to {rows[0] - 1} rows or a fraction"
            )
        else:
            try:
                return held_out_counts(rows, size)
            except ValueError as error:
                self.report.problems.append(str(error))
        return [0] * len(rows)

    def _eval_rows(self, path: str) -> None:
        rows = self._rows("eval", path, self.run.data.format)
        if rows is not None:
            self.report.facts["eval_rows"] = rows

    def _rows(self, name: str, path: str, fmt: str) -> int | None:
        """Examples that a set becomes; None if nobody knows before training.

        That is so for sets that are loaded by name then, and for the blocks of plain text.
        """
        from salient_ds.data.formats import format_of
        from salient_ds.data.sources import count_rows, is_local, loading_note

        if not is_local(path):
            self.report.notes.append(f"data.{name}={path!r} {loading_note(path)}")
            return None
        if self.run.data.task is not None:
            return task_rows(self.run, name, path, self.quick, self.report)
        if self.quick:
            return None if format_of(path, fmt) == "text" else count_rows(path)
        several = name == "train" and len(self.run.data.sets) > 1
        return self._rendered(f"{name} {path}" if several else name, path, fmt)

    def _rendered(self, name: str, path: str, fmt: str) -> int | None:
        """Examples that a file becomes once every row is rendered, as training renders it; as :meth:`_rows`."""
        from salient_ds.data.formats import check_file, format_of
        from salient_ds.data.rendering import render_file
        from salient_ds.data.templates import get_template

        data = self.run.data
        reading = fmt, data.empty_answers, data.bad_rows
        if data.template == "tokenizer":
            where = self._tokenizer_folder()
            if where is not None:
                examples, notes = rendered(self.run, path, fmt, where)
                self.report.notes += [note.replace("{name}", name) for note in notes]
                return self._examples(name, format_of(path, fmt), examples)
            summary = check_file(path, *reading)
            self.report.notes += [*summary.notes(name), f"{name}: rows were not rendered, the tokenizer is not here"]
            return self._examples(name, summary.format, summary.rows)
        found = render_file(path, *reading, get_template(data.template), None)
        self.report.notes += found.notes(name)
        assert found.summary is not None, "a file that was read has a summary"
        return self._examples(name, found.summary.format, found.examples)

    def _examples(self, name: str, fmt: str | None, rows: int) -> int | None:
        if fmt != "text":
            return rows
        self.report.notes.append(
            f"{name}: {rows:,} plain texts become blocks of data.max_length={self.run.data.max_length} tokens; how "
            "many, and so the number of steps of an epoch, is known once they are tokenised"
        )
        return None

    def _tokenizer_folder(self) -> str | None:
        """Where the run's tokenizer is on this machine; None if it is not, or has no chat template."""
        files = inspect_model(self.run.model)
        named = self.run.model.tokenizer
        folder = Path(named).expanduser() if named else files.directory
        return str(folder) if folder is not None and has_chat_template(folder) else None
