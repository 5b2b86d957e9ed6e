"""Checks everything about a run that can be known before processes start. One report lists every problem. No torch.

``salient-ds check`` prints the report. Training runs the check with ``quick=True`` on every process, and stops if there
is a problem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from salient_ds.check.built_model import BuiltModel
from salient_ds.check.data_rows import DataRows
from salient_ds.check.libraries import library_problems
from salient_ds.check.memory import estimate, estimate_stages, workload
from salient_ds.check.model_files import ModelFiles, inspect_model
from salient_ds.check.model_fit import fitting_model, sharding_problems
from salient_ds.check.model_shapes import architecture
from salient_ds.check.place import check_directory, check_disk
from salient_ds.check.report import MemoryInputs, Report
from salient_ds.check.tables import check_tables
from salient_ds.check.target_layers import target_layout
from salient_ds.check.task_rows import rough_steps
from salient_ds.check.tokenizer_files import inspect_tokenizer
from salient_ds.config.run import RunConfig
from salient_ds.config.speed import speed_notes, speed_problems
from salient_ds.models.limits import Limits
from salient_ds.ranks import RankLayout
from salient_ds.steps import steps_or_fraction, steps_per_epoch, total_steps
from salient_ds.strict import ConfigError
from salient_ds.zero.ds_json import load_ds_config, resolve_ds_config, summary


def preflight(run: RunConfig, world_size: int = 1, quick: bool = False, run_source: str = "run.yaml") -> Report:
    """Check a run without starting anything.

    Args:
        world_size: number of processes.
        quick: count data rows without validating them, start no other process, and skip the checks of the run
            directory and of the disk.
        run_source: name of the run file in messages.

    Returns:
        A report. Its facts: processes, those of :class:`DataRows`, total_steps, total_steps_exact,
        base_parameters, hidden_size, modules, shortcuts, initial_total and target_total (sums of ranks), events,
        trainable_start, trainable_end, zero, ds_config (resolved), memory (bytes per process by ZeRO stage), this_run
        (the memory with the run's own ZeRO JSON), checkpoint_bytes, free_bytes, and those of the method's
        ``batch_facts``.
    """
    checks = _Checks(run, world_size, quick, run_source)
    for check in (
        checks.template,
        checks.data,
        checks.model,
        checks.targets,
        checks.steps,
        checks.events,
        checks.zero,
        checks.memory,
    ):
        checks.guarded(check)
    checks.report.problems += library_problems(run, checks.facts.get("ds_config"))
    if not quick:
        checks.guarded(lambda: check_directory(run, checks.report))
        checks.guarded(lambda: check_disk(run, checks.report))
    return checks.report


class _Checks:
    """The single checks, in order. Later ones use what earlier ones found, and do nothing without it."""

    def __init__(self, run: RunConfig, world_size: int, quick: bool, run_source: str) -> None:
        self.run, self.world_size, self.quick, self.run_source = run, world_size, quick, run_source
        self.report = Report(facts={"processes": world_size})
        self.facts = self.report.facts
        self.files: ModelFiles | None = None
        self.built: BuiltModel | None = None
        """None if the layers of the model are not known before training."""
        self.layout: RankLayout | None = None
        """The adapted layers, then the shortcuts, at their initial ranks; None until they are known."""

    def guarded(self, check: Callable[[], None]) -> None:
        """Run a check. Errors that users can fix become problems, so that the next check still runs."""
        try:
            check()
        except ConfigError as error:
            self.report.problems.extend(error.problems)
        except ValueError as error:  # DataError is one
            if str(error) not in self.report.problems:  # several checks may find the same problem
                self.report.problems.append(str(error))
        except OSError as error:
            self.report.problems.append(f"cannot read {error.filename or 'a file'}: {error.strerror or error}")

    def template(self) -> None:
        from salient_ds.data.templates import get_template

        get_template(self.run.data.template, self.run.data.rewritten_history)

    def data(self) -> None:
        DataRows(self.run, self.quick, self.report, self.guarded).check()

    def model(self) -> None:
        self.files = files = inspect_model(self.run.model)
        self.report.problems.extend(files.problems)
        self.report.notes.extend(files.notes)
        inspect_tokenizer(self.run, files, self.report.problems)
        if files.parameters() is not None:
            self.facts["base_parameters"] = files.parameters()
        if isinstance(files.config.get("hidden_size"), int):
            self.facts["hidden_size"] = files.config["hidden_size"]
        self.guarded(self._build)
        self.guarded(lambda: check_tables(self.run, files, self.built.limits if self.built else Limits(), self.report))

    def _build(self) -> None:
        assert self.files is not None
        self.built = fitting_model(self.run, self.files, self.quick, self.report)
        if self.built is not None:
            self.facts.setdefault("base_parameters", self.built.parameters)

    def targets(self) -> None:
        if self.built is not None and self.files is not None:
            self.layout = target_layout(self.run, self.built, self.files, self.report)

    def steps(self) -> None:
        train, rows = self.run.train, self.facts.get("rows")
        if train.max_steps is not None:
            self.facts.update(total_steps=train.max_steps, total_steps_exact=True)
        elif rows is not None:
            assert train.epochs is not None
            total = total_steps(rows, train.global_batch_size, train.epochs)
            rough = rough_steps(self.run.data)
            self.facts.update(total_steps=total, total_steps_exact=rough is None)
            self.report.notes += [f"{total} steps is {rough}"] if rough else []
        else:
            return
        total = self.facts["total_steps"]
        warmup = steps_or_fraction(train.lr_warmup, total)
        if warmup >= total:
            self.report.problems.append(
                f"train.lr_warmup={train.lr_warmup:g} is not below the {total} steps of the run: "
                "lower it, or train longer"
            )

    def events(self) -> None:
        method, layout = self.run.method, self.layout
        if layout is None or not layout.modules:
            return
        start = method.adapter_parameters(layout) + self._in_full()
        self.facts.update(initial_total=method.initial_total(layout), trainable_start=start)
        if self.run.has_singular_values:
            self.facts["sigma_ratio"] = self.run.sigma_ratio(layout)
        batch_notes: list[str] = []
        self.guarded(lambda: self._batch_facts(batch_notes))
        steps = self.facts.get("total_steps")
        if steps is None:
            return
        rows, batch = self.facts.get("rows"), self.run.train.global_batch_size
        epoch = None if rows is None else steps_per_epoch(rows, batch)
        target = method.final_total(layout, steps)
        ranks = list(layout.ranks) if target == layout.total else [target / len(layout.ranks)] * len(layout.ranks)
        end = method.adapter_parameters(layout, ranks) + self._in_full()
        self.facts.update(target_total=target, trainable_end=end)
        if method.counts_epochs and epoch is None:
            self.report.notes.append("the events follow from the length of an epoch, known when data is loaded")
            return
        events = method.events(layout, steps, epoch)
        self.facts["events"] = [asdict(event) for event in events]
        self.report.notes += batch_notes + method.event_notes(events, target)
        if events and events[-1].step >= steps and target < self.facts["initial_total"]:
            self.report.notes.append(
                f"no steps follow the last event, at step {events[-1].step} of {steps}: nothing recovers what is cut "
                "there, and held-out loss rises; leave a part of the run, such as method.final_warmup=0.2"
            )

    def _in_full(self) -> int:
        """Number of parameters (elements) that are trained in full."""
        return int(self.facts.get("in_full", {}).get("parameters", 0))

    def _batch_facts(self, notes: list[str]) -> None:
        """Facts and notes that follow from the number of micro-batches per step on one process."""
        per_pass = self.run.train.micro_batch_size * self.world_size
        facts, found = self.run.method.batch_facts(max(1, self.run.train.global_batch_size // per_pass))
        self.facts.update(facts)
        notes += found

    def zero(self) -> None:
        raw = load_ds_config(self.run.deepspeed)
        self.facts["ds_config"] = resolve_ds_config(
            raw,
            self.run,
            self.world_size,
            self.facts.get("total_steps"),
            hidden_size=self.facts.get("hidden_size"),
            run_source=self.run_source,
        )
        zero = summary(self.facts["ds_config"])
        self.facts["zero"] = asdict(zero)
        shortcuts, plan = self.run.adapter.shortcuts is not None, self.run.speed_plan(zero.stage)
        speed, method = self.run.speed, self.run.method
        self.report.problems.extend(speed_problems(speed, method, zero.stage, shortcuts))
        events = bool(self.facts.get("events"))
        self.report.notes.extend(speed_notes(speed, method, zero.stage, shortcuts, events, self.run.data.packing))
        self._room(plan.grows_in_flight)
        self.report.problems += sharding_problems(self.run, self.files, plan.sharded_base and self.world_size > 1)
        if plan.sharded_base:
            self.report.notes.append(
                "ZeRO-3 partitions the frozen base's layers only (speed.zero3): embeddings, output head and adapters "
                "are replicated in training precision, the adapters' masters and moments partitioned; stage3_* keys "
                "are not read"
            )

    def _room(self, in_flight: bool) -> None:
        """Note which rows of growing matrices exist from the start."""
        method, rank, layout = self.run.method, self.run.adapter.rank, self.layout
        if not method.grows or layout is None or not layout.modules:
            return
        note = f"all adapter.rank={rank} rows per matrix exist from the start: the largest rank you expect is enough"
        if in_flight:
            count = len(layout.modules)
            room = method.first_room(count, rank)
            self.facts["trainable_start"] = method.adapter_parameters(layout, [room] * count) + self._in_full()
            note = (
                f"matrices begin with room for {room} of adapter.rank={rank} rows and get more when they need it "
                "(speed.growth); memory is an upper bound: growth in the widest ones, and the moment when room is made"
            )
        self.report.notes.append(note)

    def memory(self) -> None:
        layout = self.layout
        if layout is None or not layout.modules or not {"ds_config", "base_parameters"} <= self.facts.keys():
            return
        assert self.files is not None
        base, shape, full = self.facts["base_parameters"], architecture(self.files.config), self._in_full()
        self.report.memory_inputs = MemoryInputs(base, layout, shape, full)
        work = workload(self.run, base, layout, shape, self.world_size, full)
        ds = summary(self.facts["ds_config"])
        self.facts["memory"] = {name: asdict(row) for name, row in estimate_stages(work, ds, self.world_size).items()}
        self.facts["this_run"] = asdict(estimate(work, ds, self.world_size))
        # fp32 master and both moments of everything that is trained
        self.facts["checkpoint_bytes"] = 12 * work.at(ds.stage).trainable
