"""One training run, from files to adapter. :meth:`Training.run` shows the order of its parts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from salient_ds.config.run import RunConfig
from salient_ds.data.sampler import StepSampler
from salient_ds.engine.checkpoint import kept_rows, load
from salient_ds.engine.reports import Diverged, NonFiniteLoss, StepReport
from salient_ds.methods.duties import ReportingMethod, ScoringMethod
from salient_ds.models.heads import head_facts, pad_with
from salient_ds.models.loading import hidden_size, load_base, load_tokenizer, refuse_unfit
from salient_ds.monitor.progress import Progress
from salient_ds.monitor.run_log import RunLog
from salient_ds.run.assemble import assemble
from salient_ds.run.counters import Counters
from salient_ds.run.export import export_run
from salient_ds.run.fits import refuse_misfits
from salient_ds.run.held_out import HeldOut
from salient_ds.run.inputs import Inputs, load_inputs, micro_batches, probe_data
from salient_ds.run.keeping import Keeper
from salient_ds.run.resuming import (
    Start,
    agree,
    base_of,
    built_identity,
    open_run,
    own_checkpoint,
    run_identity,
    ways_on,
)  # fmt: skip
from salient_ds.run.same_everywhere import agreed, data_facts
from salient_ds.run.stopping import STOP, Stopped, StopRequest
from salient_ds.zero.collectives import all_succeeded, world
from salient_ds.zero.ds_json import load_ds_config, resolve_ds_config, summary
from salient_ds.zero.sharded_base import effective_config


class Training:
    """One training run, as this process takes part in it."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        read_inputs: Callable[[RunConfig, Any], Inputs] = load_inputs,
        after_step: Callable[[Training, StepReport], None] | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        """
        Args:
            read_inputs: reads the data of the configuration with the tokenizer.
            after_step: called after every applied step, once it is logged and saved. It may raise to end the run.
            stop: asked in every step whether to save and end.
        """
        self.config = config
        self.device = device
        self.read_inputs, self.after_step, self.stop = read_inputs, after_step, stop or StopRequest()
        self.global_rank, self.world_size = world()
        self.is_main = self.global_rank == 0
        self.counters = Counters()
        self.resume_from: Path | None = None
        self.start = Start()
        self.changes: list[dict[str, Any]] = []
        """Settings that changed when the run was resumed, see :class:`salient_ds.run.resuming.Start`."""
        self.identity: dict[str, Any] = {}
        self.head: dict[str, Any] = {}
        """What config.json of a merged model states about the head."""

    @property
    def rank(self) -> int:
        """The former name of ``global_rank``."""
        return self.global_rank

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
        try:
            self.loop()
            self.finish()
        finally:
            self.keeper.close()

    def open_directory(self, resume: str, overwrite: bool) -> None:
        """Claim the run directory, and agree with all processes on the checkpoint to resume."""
        place = Path(self.config.output_dir)
        self.directory, self.resume_from = open_run(place, resume, overwrite, self.device, self.say)

    def load_data(self) -> None:
        """Load tokenizer and data, and compute the number of steps and the settings for DeepSpeed."""
        refuse_unfit(self.config)
        self.tokenizer = load_tokenizer(self.config.model)
        self.inputs = self.read_inputs(self.config, self.tokenizer)
        agreed(lambda: data_facts(self.inputs), self.device)
        self.total_steps = self.inputs.total_steps(self.config)
        self.held_out = HeldOut(self.config, self.total_steps)
        train = self.config.train
        self.sampler = StepSampler(len(self.inputs.train), train.global_batch_size, train.seed)
        list(map(self.say, self.inputs.notes))
        config = self.config
        raw, size = load_ds_config(config.deepspeed), hidden_size(config.model)
        ds_config = resolve_ds_config(raw, config, self.world_size, self.total_steps, hidden_size=size)
        self.ds_config = effective_config(ds_config, config, self.world_size)

    def compare(self, changes: Sequence[str] = ()) -> None:
        """Compare this run with the checkpoint to resume. Nothing is written, and the base is not loaded yet.

        Raises:
            CheckpointError: on all processes, if they differ in more than ``changes``.
        """
        self.identity = run_identity(self.config, self.inputs, self.total_steps, self.ds_config)
        base, self.start = agree(
            self.directory, self.resume_from, self.config, self.identity, self.total_steps, changes, self.device
        )
        self.identity |= base
        list(map(self.say, self.start.notes))

    def build(self) -> None:
        """Build base model, adapters, method and engine, in this order: ZeRO-3 partitions the base while it loads."""
        config, ds_config = self.config, self.ds_config
        torch.manual_seed(config.train.seed)
        base = load_base(config.model, config.train, ds_config, self.inputs.labels)
        model = base.model
        if base.note is not None:
            self.say(base.note)
        pad_with(model, self.inputs.collator.pad_token_id)
        self.inputs = self.inputs.for_model(model)
        refuse_misfits(model, self.inputs, config.data.max_length)
        kept_N = kept_rows(self.resume_from) if self.resume_from is not None else None
        probes = config.method.probe_batches_of(config.train.micro_batch_size)
        self.engine = assemble(
            model,
            config,
            ds_config,
            self.total_steps,
            self.device,
            kept_N=kept_N,
            steps_per_epoch=self.sampler.steps_per_epoch,
            probe_data=probe_data(self.inputs, *probes, self.device) if probes is not None else None,
            fresh=base.fresh,
        )
        self.head = head_facts(model, config.model.task)
        method, modules = self.engine.method, self.engine.initial_layout.modules
        self.say(f"adapters: {config.method.name} on {len(modules)} matrices, rank {config.adapter.rank}")
        if self.engine.adapted.full:
            self.say(f"trained in full: {', '.join(self.engine.adapted.full)}")
        list(map(self.say, (f"note: {note}" for note in self.engine.adapted.notes)))
        if isinstance(method, ScoringMethod):
            self.say(f"scores of matrices: {'exact, of the averaged gradient' if method.exact_scores else 'mean'}")
        self.identity |= built_identity(model, self.engine, config, summary(ds_config).stage)
        torch.manual_seed(config.train.seed + 1000 * (self.global_rank + 1))  # dropout differs between processes

    def restore(self) -> None:
        """Restore the checkpoint to resume, if there is one. Only then write to the run directory."""
        if "base weights" not in self.identity:  # they were downloaded meanwhile
            self.identity |= base_of(self.config, self.device)
        if self.resume_from is not None:
            extra = load(self.engine.state, self.resume_from, self.identity, self.start.changed_keys)
            self.counters = Counters(**extra["counters"])
            self.changes = [*extra.get("changes", []), *self.start.changes]
            self.held_out.restore(extra)
            self.say(f"continuing from {self.resume_from} after step {self.engine.step}")
        all_succeeded(True, self.device)  # every process has accepted the checkpoint
        self._record()
        self.log = RunLog(self.directory, self.engine, self.config.train.log_every, self.is_main)
        list(map(self.say, self.log.rewind(self.engine.step)))
        self.keeper = Keeper(self.engine, self.directory.checkpoints, self.config.train, self.identity)
        self.engine.flags[STOP] = self.stop.asked

    def _record(self) -> None:
        """Write the resolved settings and some facts of the run into its directory."""
        if self.is_main:
            facts = {"processes": self.world_size, "total_steps": self.total_steps, "identity": self.identity,
                     "changes": self.changes, "modules": self.engine.initial_layout.modules,
                     "template": self.inputs.record.to_dict() if self.inputs.record else None,
                     "head": self.head}  # fmt: skip
            run = self.config.model_dump(mode="json", by_alias=True)
            self.directory.write_resolved(run, self.ds_config, facts)

    def loop(self) -> None:
        """Train until the last step, with evaluations and checkpoints on the way."""
        train, engine, log = self.config.train, self.engine, self.log
        total = engine.decisions.latest.total
        with Progress(self.total_steps, engine.step, main=self.is_main, every=train.log_every, total_rank=total) as bar:
            self.bar = bar
            while engine.step < self.total_steps and not self.held_out.exhausted:
                began = time.perf_counter()
                batches, targets = micro_batches(
                    self.inputs, self.sampler, self.counters.batches,
                    global_rank=self.global_rank, world_size=self.world_size, size=train.micro_batch_size,
                    device=self.device,
                )  # fmt: skip
                report = self._step(batches, targets)
                self.keeper.after_step(report)
                if report.skipped:
                    bar.message(f"step {engine.step + 1} skipped: {self.counters.skips()}")
                    continue
                tokens = self.world_size * sum(b.inputs["input_ids"].numel() for b in batches)
                self.counters.tokens += tokens
                bar.update(engine.step, report.loss, tokens, engine.decisions.latest.total)
                last = engine.step == self.total_steps
                log.step(report, tokens, self.counters, time.perf_counter() - began, last)
                if train.eval_every and engine.step % train.eval_every == 0 and not last:
                    bar.message(self.evaluate())
                if self.keeper.wants(report) and not last:
                    self.save()
                if self.after_step is not None:
                    self.after_step(self, report)
                if STOP in report.raised and not last:
                    self.end_early()

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
        saved = self.save()
        self.keeper.wait()
        all_succeeded(True, self.device)  # a launcher ends all processes once one has ended
        raise Stopped(
            f"stopped after step {self.engine.step} of {self.total_steps}, saved as {saved}: --resume auto goes on"
        )

    def finish(self) -> None:
        """Write the last checkpoint, the evaluation, the exported adapter and pictures."""
        self.engine.finish()
        done = self.resume_from if self.engine.step == self.start.step else None  # was stopped after its last step
        saved = done if done is not None and own_checkpoint(self.directory, done) else self.save()
        self.say(self.evaluate())
        self.keeper.wait()
        if self.engine.step > self.start.step or not self.directory.summary.exists():
            self.log.summary(self.bar, skipped_steps=self.counters.skipped, **self.held_out.facts())
        if self.is_main:
            path = self.held_out.result(saved, self.directory.checkpoints)
            export_run(self.directory.path, None, self.directory.adapter, overwrite=True, checkpoint=path)
            self.log.pictures()
            if isinstance(self.engine.method, ReportingMethod):
                run = self.config.model_dump(mode="json", by_alias=True, exclude_unset=True)
                self.engine.method.write_results(self.directory.path, run)
            self.directory.mark_finished(self.engine.step)
            self.say(f"adapter: {self.directory.adapter}")
        all_succeeded(True, self.device)  # no process leaves while the main process still writes

    def say(self, text: str) -> None:
        """Print a line for the user, on the main process only."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)
