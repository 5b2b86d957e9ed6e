"""A run before its first step: directory, data, comparison with the checkpoint, model and engine, restored state."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from salient_ds.config.run import RunConfig
from salient_ds.engine.checkpoint import kept_rows, load
from salient_ds.methods.duties import ScoringMethod
from salient_ds.models.heads import head_facts, pad_with
from salient_ds.models.loading import hidden_size, load_base, load_tokenizer, refuse_unfit
from salient_ds.monitor.run_log import RunLog
from salient_ds.run.assemble import assemble
from salient_ds.run.counters import Counters
from salient_ds.run.fits import refuse_misfits
from salient_ds.run.held_out import HeldOut
from salient_ds.run.inputs import Inputs, probe_data
from salient_ds.run.keeping import Keeper
from salient_ds.run.resuming import (
    Start,
    agree,
    base_of,
    built_identity,
    open_run,
    run_identity,
)
from salient_ds.run.same_everywhere import NodesDiffer, agreed, data_facts, environment_facts
from salient_ds.run.whereabouts import Whereabouts
from salient_ds.zero.collectives import all_equal, all_succeeded, world
from salient_ds.zero.ds_json import load_ds_config, resolve_ds_config, summary
from salient_ds.zero.sharded_base import effective_config


class PreparedRun:
    """A run, as this process takes part in it. Its methods are called in the order in which they stand here."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        read_inputs: Callable[[RunConfig, Any], Inputs],
        where: Whereabouts,
    ) -> None:
        """
        Args:
            read_inputs: reads the data of the configuration with the tokenizer.
            where: is told where this process is.
        """
        self.config = config
        self.device = device
        self.read_inputs, self.where = read_inputs, where
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

    def open_directory(self, resume: str, overwrite: bool) -> None:
        """Claim the run directory, and agree with all processes on the checkpoint to resume."""
        place = Path(self.config.output_dir)
        self.directory, self.resume_from = open_run(place, resume, overwrite, self.device, self.say)

    def load_data(self) -> None:
        """Load tokenizer and data, and compute the number of steps and the settings for DeepSpeed."""
        self.where.at("loading the data")
        refuse_unfit(self.config)
        self.tokenizer = load_tokenizer(self.config.model)
        self.inputs = self.read_inputs(self.config, self.tokenizer)
        agreed(lambda: data_facts(self.inputs), self.device)
        self.total_steps = self.inputs.total_steps(self.config)
        self.held_out = HeldOut(self.config, self.total_steps)
        self.sampler = self.inputs.sampler(self.config.train)
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
        self.where.at("comparing with the checkpoint")
        self.identity = run_identity(self.config, self.inputs, self.total_steps, self.ds_config)
        base, self.start = agree(
            self.directory, self.resume_from, self.config, self.identity, self.total_steps, changes, self.device
        )
        self.identity |= base
        list(map(self.say, self.start.notes))

    def build(self) -> None:
        """Build base model, adapters, method and engine, in this order: ZeRO-3 partitions the base while it loads."""
        self.where.at("loading the model")
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
        for note in self.engine.adapted.notes:
            self.say(f"note: {note}")
        if isinstance(method, ScoringMethod):
            self.say(f"scores of matrices: {'exact, of the averaged gradient' if method.exact_scores else 'mean'}")
        self.identity |= built_identity(model, self.engine, config, summary(ds_config).stage)
        torch.manual_seed(config.train.seed + 1000 * (self.global_rank + 1))  # dropout differs between processes

    def restore(self) -> None:
        """Restore the checkpoint to resume, if there is one. Only then write to the run directory."""
        self.where.at("restoring the checkpoint")
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
        self.log.open_loggers(self.config.train.log, self.config.model_dump(mode="json", by_alias=True))
        self.keeper = Keeper(self.engine, self.directory.checkpoints, self.config.train, self.identity)
        if not all_equal(self.keeper.frozen.digest(), self.device):
            raise NodesDiffer(
                "the processes do not hold the same frozen weights after loading: look at the weight files and at the "
                "memory of the nodes"
            )

    def _record(self) -> None:
        """Write the resolved settings and some facts of the run into its directory."""
        if self.is_main:
            facts = {"processes": self.world_size, "total_steps": self.total_steps, "identity": self.identity,
                     "changes": self.changes, "modules": self.engine.initial_layout.modules,
                     "initial_ranks": list(self.engine.initial_layout.ranks), "environment": environment_facts(),
                     "data": self._data_facts(),
                     "template": self.inputs.record.to_dict() if self.inputs.record else None,
                     "head": self.head}  # fmt: skip
            run = self.config.model_dump(mode="json", by_alias=True)
            self.directory.write_resolved(run, self.ds_config, facts)

    def _data_facts(self) -> dict[str, Any]:
        """What a report says about the data, besides the settings."""
        inputs, data = self.inputs, self.config.data
        held_out = len(inputs.held_out) if inputs.held_out is not None else 0
        notes = {f"note {number}": note for number, note in enumerate(inputs.notes, 1)}
        sets = data.sets
        named = {"train": sets[0].path} if len(sets) == 1 else {f"train {k}": one.path for k, one in enumerate(sets, 1)}
        weights = {f"weight {k}": one.weight for k, one in enumerate(sets, 1)} if inputs.shares else {}
        epoch = {"items of an epoch": inputs.rows_per_epoch} if inputs.shares else {}
        counts = {"items to train on": len(inputs.train), **epoch, "items held out": held_out}
        return {**named, **weights, **counts, **notes}

    def say(self, text: str) -> None:
        """Print a line for the user, on the main process only."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)
