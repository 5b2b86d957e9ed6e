"""One training run, from files to adapter. :meth:`Training.run` shows the order of its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from salient_ds.config.run import RunConfig
from salient_ds.engine.reports import Diverged, MicroBatch, NonFiniteLoss, StepReport
from salient_ds.methods.duties import ReportingMethod
from salient_ds.monitor.progress import Progress
from salient_ds.run.active import speed_facts
from salient_ds.run.export import export_run
from salient_ds.run.inputs import Inputs, load_inputs, micro_batches, placed
from salient_ds.run.messages import Messages
from salient_ds.run.prefetch import Prefetched
from salient_ds.run.prepared import PreparedRun
from salient_ds.run.resuming import own_checkpoint, ways_on
from salient_ds.run.stopping import STOP, Stopped, StopRequest
from salient_ds.run.utilisation import Utilisation
from salient_ds.run.whereabouts import Whereabouts
from salient_ds.zero.collectives import all_succeeded
from salient_ds.zero.ds_json import summary


class Training(PreparedRun):
    """One training run, as this process takes part in it."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        read_inputs: Callable[[RunConfig, Any], Inputs] = load_inputs,
        after_step: Callable[[Training, StepReport], None] | None = None,
        stop: StopRequest | None = None,
        where: Whereabouts | None = None,
        messages: Messages | None = None,
    ) -> None:
        """
        Args:
            read_inputs: reads the data of the configuration with the tokenizer.
            after_step: called after every applied step, once it is logged and saved. It may raise to end the run.
            stop: asked in every step whether to save and end.
            where: is told where this process is.
            messages: is told where the run directory is, and names its file at the end; None: nothing is kept off the
                screen.
        """
        super().__init__(config, device, read_inputs, where or Whereabouts())
        self.messages = messages
        self.after_step, self.stop = after_step, stop or StopRequest()

    def run(self, resume: str, overwrite: bool, changes: Sequence[str] = ()) -> None:
        """Train to the end. Every process calls it.

        Args:
            resume: "never", "auto" (continue from the last whole checkpoint), or the path of a checkpoint.
            overwrite: replace an earlier run in the run directory.
            changes: settings that may have another value than in the checkpoint; see
                :data:`salient_ds.engine.identity.CHANGEABLE`.

        Raises:
            RunDirectoryError: the run directory cannot be used.
            CheckpointError: a checkpoint cannot be written or read.
            Stopped: the run was asked to stop, has saved a checkpoint and is not at its end.
            Diverged: the loss, or the gradients of many steps in a row, are not finite.
            ValueError: the run cannot start or continue.
        """
        self.open_directory(resume, overwrite)
        self.load_data()
        self.compare(changes)
        if self.start.nothing_to_do:
            return
        self.build()
        self.restore()
        if self.messages is not None:
            self.messages.keep_in(self.directory.path)
        try:
            self.loop()
            self.finish()
        finally:
            self.keeper.close()
            self.log.close()

    def loop(self) -> None:
        """Train until the last step, with evaluations and checkpoints on the way."""
        train, engine, log = self.config.train, self.engine, self.log
        stop, is_main = self.stop, self.is_main  # without self, which would live as long as the engine, with its lock
        engine.flags[STOP] = lambda: stop.asked(is_main)
        total, used = engine.decisions.latest.total, Utilisation(engine, train, self.device)
        if used.note is not None:
            self.say(used.note)
        shown = Progress(self.total_steps, engine.step, main=self.is_main, every=train.log_every, total_rank=total)
        with shown as bar, Prefetched(self._batches_of) as ahead:
            self.bar = bar
            while engine.step < self.total_steps and not self.held_out.exhausted:
                began = time.perf_counter()
                self.where.at(lambda: f"step {engine.step + 1} ({engine.phase})")
                on_host, targets = ahead.take(self.counters.batches)
                batches = [placed(batch, self.device) for batch in on_host]
                rate = float(engine.engine.get_lr()[0])  # the schedule moves on with the step
                report = self._step(batches, targets)
                self.keeper.after_step(report)
                if report.skipped:
                    bar.message(f"step {engine.step + 1} skipped: {self.counters.skips()}")
                    continue
                tokens = self.world_size * sum(b.inputs["input_ids"].numel() for b in batches)
                self.counters.tokens += tokens
                took = time.perf_counter() - began
                mfu = used.of(batches, took) if self.is_main else None
                bar.update(engine.step, report.loss, tokens, engine.decisions.latest.total, mfu)
                last = engine.step == self.total_steps
                log.step(report, tokens, self.counters, took, rate, last, mfu)
                if train.eval_every and engine.step % train.eval_every == 0 and not last:
                    bar.message(self.evaluate())
                if self.keeper.wants(report) and not last:
                    self.save()
                if self.after_step is not None:
                    self.after_step(self, report)
                if STOP in report.raised and not last:
                    self.end_early()

    def _batches_of(self, number: int) -> tuple[list[MicroBatch], int]:
        """This process' part of a global batch, in host memory. A thread calls it ahead of time."""
        return micro_batches(
            self.inputs, self.sampler, number,
            global_rank=self.global_rank, world_size=self.world_size, size=self.config.train.micro_batch_size,
            device=torch.device("cpu"), model=self.engine.adapted.model,
        )  # fmt: skip

    def _step(self, batches: list[Any], targets: int) -> StepReport:
        try:
            report = self.engine.train_step(batches, targets)
        except NonFiniteLoss as error:
            raise Diverged(f"{error}; {self._ways_on()}, or look at those rows") from error
        self.counters.count(report.skipped)
        if self.counters.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise Diverged(
                f"{self.counters.skipped_in_a_row} steps in a row were skipped because of non-finite gradients (bound: "
                f"train.max_skipped_steps) after step {self.engine.step}; {self._ways_on()}, look "
                "at the data, or begin again with train.precision=bf16"
            )
        return report

    def _ways_on(self) -> str:
        self.keeper.wait()  # all processes stop at this step
        return ways_on(self.directory.checkpoints)

    def evaluate(self) -> str:
        """Evaluate the held-out data over all processes, log it, and return it as a line of text.

        If it is the best evaluation so far, a checkpoint of this step is written.
        """
        step = f"step {self.engine.step}"
        if self.inputs.held_out is None:
            return f"{step}: no held-out data (data.eval, data.eval_size)"
        held_out = self.held_out
        self.where.at(f"the evaluation after {step}")
        if held_out.evaluate(self.inputs, self.engine, self.tokenizer, summary(self.ds_config).stage):
            self.save()
        assert held_out.outcome is not None
        self.log.evaluation(held_out.outcome.values)
        self.bar.evaluated = held_out.shown(self.inputs)
        return f"{step}: {held_out.text()}"

    def save(self) -> Path:
        """Begin a checkpoint of the current state, unless there is one of this step, and return its directory.

        It is written while training goes on. ``self.keeper.wait()`` waits for it.
        """
        extra = {"counters": asdict(self.counters), "changes": self.changes, **self.held_out.state()}
        return self.keeper.save(extra, self.held_out.best_step)

    def end_early(self) -> None:
        """Save this step on all processes. Raises Stopped."""
        self.where.at(f"the last save, of step {self.engine.step}")
        saved = self.save()
        self.keeper.wait()
        all_succeeded(True, self.device)  # a launcher ends all processes once one has ended
        raise Stopped(
            f"stopped after step {self.engine.step} of {self.total_steps}{self.stop.why()}, saved as {saved}: "
            "--resume auto goes on"
        )

    def finish(self) -> None:
        """Write the last checkpoint, the evaluation, the exported adapter and pictures."""
        self.engine.finish()
        done = self.resume_from if self.engine.step == self.start.step else None  # was stopped after its last step
        saved = done if done is not None and own_checkpoint(self.directory, done) else self.save()
        self.say(self.evaluate())
        self.where.at("the end, with the last checkpoint and the adapter")
        self.keeper.wait()
        if self.engine.step > self.start.step or not self.directory.summary.exists():
            facts = self.held_out.facts() | speed_facts(self.engine)
            self.log.summary(self.bar, skipped_steps=self.counters.skipped, **facts)
        if self.is_main:
            path = self.held_out.result(saved, self.directory.checkpoints)
            export_run(self.directory.path, None, self.directory.adapter, overwrite=True, checkpoint=path)
            self.log.pictures()
            if isinstance(self.engine.method, ReportingMethod):
                run = self.config.model_dump(mode="json", by_alias=True, exclude_unset=True)
                self.engine.method.write_results(self.directory.path, run)
            self.directory.mark_finished(self.engine.step)
            self.say(f"adapter: {self.directory.adapter}")
            kept = self.messages.note() if self.messages is not None else None
            if kept is not None:
                self.say(kept)
            look = "chat" if self.config.data.task is None else "evaluate"
            self.say(f"next: salient-ds {{report,{look},export}} {self.directory.path}")
        all_succeeded(True, self.device)  # no process leaves while the main process still writes
