"""Everything about a run that can be known before processes start: one report with every problem. No torch.

``salient-ds check`` prints the report; training calls it with ``quick=True`` on every process and stops on a problem.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from math import ceil
from typing import Any

from salient_ds.config import ConfigError, RunConfig
from salient_ds.fused_kernels import kernel_problems
from salient_ds.memory import adapter_parameters, estimate, estimate_stages, workload
from salient_ds.method_config import HeteroLoRAConfig, IncreLoRAConfig
from salient_ds.model_files import ModelFiles, inspect_model
from salient_ds.model_shapes import architecture
from salient_ds.preflight_place import check_directory, check_disk
from salient_ds.salience.budget import steps_or_fraction
from salient_ds.salience.growth import exact_scores, first_room
from salient_ds.salience.schedules import initial_total, method_events, target_total
from salient_ds.salience.search_schedule import SearchSpace
from salient_ds.speed_config import speed_problems
from salient_ds.targets import match_shortcuts, match_targets
from salient_ds.tokenizer_files import inspect_tokenizer
from salient_ds.zero.config import load_ds_config, resolve_ds_config, summary


@dataclass
class Report:
    """Result of :func:`preflight`."""

    problems: list[str] = field(default_factory=list)
    """Whatever stops the run, one sentence each."""
    notes: list[str] = field(default_factory=list)
    """What could not be checked, or is allowed but worth knowing."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What was found out, JSON-able; a fact that could not be found out is absent (see :func:`preflight`)."""


def preflight(run: RunConfig, world_size: int = 1, quick: bool = False, run_source: str = "run.yaml") -> Report:
    """Check a run without starting anything.

    Args:
        world_size: number of processes.
        quick: skip what training checks again anyway: every data row (only counted), the run directory and the disk.
        run_source: name of the run file in messages.

    Returns:
        A report. Facts: processes, rows, total_steps, total_steps_exact, base_parameters, hidden_size, modules,
        initial_total and target_total (sums of ranks), events, trainable_start, trainable_end, zero, ds_config
        (resolved), memory (bytes per process by ZeRO stage), this_run (the one the ZeRO JSON asks for),
        checkpoint_bytes, free_bytes.
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
    if not quick:
        checks.guarded(lambda: check_directory(run, checks.report))
        checks.guarded(lambda: check_disk(run, checks.report))
    return checks.report


class _Checks:
    """The single checks, in order; later ones use what earlier ones found and skip themselves without it."""

    def __init__(self, run: RunConfig, world_size: int, quick: bool, run_source: str) -> None:
        self.run, self.world_size, self.quick, self.run_source = run, world_size, quick, run_source
        self.report = Report(facts={"processes": world_size})
        self.facts = self.report.facts
        self.files: ModelFiles | None = None
        self.adapted: list[tuple[str, tuple[int, int]]] = []
        """Paths and (out, in) features of the adapted layers, then of the shortcuts."""
        self.ranks: list[int] = []

    def guarded(self, check: Callable[[], None]) -> None:
        """Turn the errors that users can mend into problems, so that the next check still runs."""
        try:
            check()
        except ConfigError as error:
            self.report.problems.extend(error.problems)
        except ValueError as error:  # DataError is one
            if str(error) not in self.report.problems:  # several checks may ask for what cannot be had
                self.report.problems.append(str(error))
        except OSError as error:
            self.report.problems.append(f"cannot read {error.filename or 'a file'}: {error.strerror or error}")

    def template(self) -> None:
        from salient_ds.data.templates import get_template

        get_template(self.run.data.template)

    def data(self) -> None:
        self.guarded(lambda: self._rows("train", self.run.data.train))
        if self.run.data.eval is not None:
            self.guarded(lambda: self._rows("eval", str(self.run.data.eval)))
        elif not self.run.data.eval_size and self.run.train.eval_every:
            self.report.problems.append(
                f"train.eval_every={self.run.train.eval_every}, but there is no held-out data: set data.eval or "
                "data.eval_size, or eval_every to 0"
            )
        size, rows = self.run.data.eval_size, self.facts.get("rows")
        if self.run.data.eval is None and size and rows is not None:
            held_out = int(size) if size >= 1 else round(size * rows)
            if not 0 < held_out < rows:
                self.report.problems.append(
                    f"data.eval_size={size:g} holds out {held_out} of {rows} rows: at least one has to be on either "
                    f"side, give 1 to {rows - 1} rows or a fraction"
                )
                return
            self.facts["held_out_rows"] = held_out
            self.facts["rows"] = rows - held_out

    def _rows(self, name: str, path: str) -> None:
        from salient_ds.data.formats import check_file, count_rows, is_local

        if not is_local(path):
            self.report.notes.append(
                f"data.{name}={path!r} is loaded by name when training starts: nothing about it was checked"
            )
            return
        rows = count_rows(path) if self.quick else check_file(path, self.run.data.format).rows
        self.facts["rows" if name == "train" else "eval_rows"] = rows

    def model(self) -> None:
        self.files = files = inspect_model(self.run.model)
        self.report.problems.extend(files.problems)
        self.report.notes.extend(files.notes)
        self.report.problems.extend(kernel_problems(self.run.speed, files.config.get("model_type")))
        inspect_tokenizer(self.run, files, self.report.problems)
        if files.parameters() is not None:
            self.facts["base_parameters"] = files.parameters()
        if isinstance(files.config.get("hidden_size"), int):
            self.facts["hidden_size"] = files.config["hidden_size"]
        longest = files.config.get("max_position_embeddings")
        if isinstance(longest, int) and self.run.data.max_length > longest:
            self.report.notes.append(
                f"data.max_length={self.run.data.max_length} is above the {longest} positions the model was made for"
            )

    def targets(self) -> None:
        assert self.files is not None
        shapes = self.files.linear_shapes()
        if not shapes:
            if not self.files.problems:
                self.report.notes.append(
                    "the layers of this model are not known before it is built: targets, events, memory unchecked"
                )
            return
        rank, wanted = self.run.adapter.rank, self.run.adapter.target_modules
        self.adapted = match_targets(shapes, wanted) if wanted or not self.run.adapter.shortcuts else []
        self.ranks = [rank] * len(self.adapted)
        self._shortcuts(list(shapes))
        self.facts["modules"] = len(self.adapted)
        narrow = [name for name, shape in self.adapted if rank > min(shape)]
        if narrow:
            out, inner = dict(self.adapted)[narrow[0]]
            self.report.notes.append(
                f"adapter.rank={rank} is above the smaller side of {len(narrow)} of {len(self.adapted)} matrices "
                f"({narrow[0]} is {out} x {inner}): the surplus adds nothing there"
            )

    def _shortcuts(self, linear_names: list[str]) -> None:
        chosen, width = self.run.adapter.shortcuts, self.facts.get("hidden_size")
        if chosen is None or width is None:
            return
        found = match_shortcuts(linear_names, chosen.modules)
        self.facts["shortcuts"] = len(found)
        self.adapted += [(name, (width, width)) for name in found]
        self.ranks += [chosen.rank or self.run.adapter.rank] * len(found)

    def steps(self) -> None:
        train, rows = self.run.train, self.facts.get("rows")
        if train.max_steps is not None:
            self.facts.update(total_steps=train.max_steps, total_steps_exact=True)
        elif rows is not None:
            assert train.epochs is not None
            total = max(1, ceil(train.epochs * rows / train.global_batch_size))
            self.facts.update(total_steps=total, total_steps_exact=not self.run.data.packing)
            if self.run.data.packing:
                self.report.notes.append(
                    f"{total} steps is an upper bound: with data.packing the number of sequences is known later"
                )
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
        method, shapes = self.run.method, [shape for _, shape in self.adapted]
        if not shapes:
            return
        ranks = self.ranks
        start = adapter_parameters(method, shapes, ranks)
        self.facts.update(initial_total=initial_total(method, ranks), trainable_start=start)
        if isinstance(method, IncreLoRAConfig):
            per_pass = self.run.train.micro_batch_size * self.world_size
            accumulation = max(1, self.run.train.global_batch_size // per_pass)
            self.guarded(lambda: self.facts.update(exact_scores=exact_scores(method.score_reduction, accumulation)))
        total_steps = self.facts.get("total_steps")
        if total_steps is None:
            return
        space, epoch = self._space(), self._steps_per_epoch()
        target = target_total(method, ranks, total_steps, space)
        end = adapter_parameters(method, shapes, [target / len(ranks)] * len(ranks))
        self.facts.update(target_total=target, trainable_end=end)
        if isinstance(method, HeteroLoRAConfig) and method.counts_epochs and epoch is None:
            self.report.notes.append("the events follow from the length of an epoch, known when data is loaded")
            return
        events = method_events(method, ranks, total_steps, space, epoch)
        self.facts["events"] = [asdict(event) for event in events]
        if isinstance(method, IncreLoRAConfig):
            if "exact_scores" in self.facts:
                kind = "exact, of the averaged gradient" if self.facts["exact_scores"] else "mean, over micro-batches"
                self.report.notes.append(f"method.score_reduction={method.score_reduction}: scores are {kind}")
        elif events and events[-1].total_rank > target:
            self.report.notes.append(
                f"the last event leaves {events[-1].total_rank} ranks, above the target {target}: "
                "set method.final_prune=true to end at the target"
            )

    def _space(self) -> SearchSpace:
        """What a search for modules chooses from."""
        linears = len(self.adapted) - self.facts.get("shortcuts", 0)
        parameters = [r * (out + inner) for r, (_, (out, inner)) in zip(self.ranks, self.adapted, strict=True)]
        is_shortcut = tuple(k >= linears for k in range(len(self.adapted)))
        return SearchSpace(tuple(self.ranks), tuple(parameters), is_shortcut)

    def _steps_per_epoch(self) -> int | None:
        rows = self.facts.get("rows")
        return None if rows is None else ceil(rows / self.run.train.global_batch_size)

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
        self.report.problems.extend(speed_problems(self.run.speed, self.run.method.name, zero.stage, shortcuts))
        self._room(plan.grows_in_flight)
        if plan.sharded_base:
            self.report.notes.append(
                "ZeRO-3 partitions the frozen base's layers only (speed.zero3): embeddings, output head and adapters "
                "are replicated in training precision, the adapters' masters and moments partitioned; stage3_* keys "
                "are not read"
            )

    def _room(self, in_flight: bool) -> None:
        """Say which rows exist of matrices that grow."""
        method, rank, shapes = self.run.method, self.run.adapter.rank, [shape for _, shape in self.adapted]
        if not isinstance(method, IncreLoRAConfig) or not shapes:
            return
        note = f"all adapter.rank={rank} rows per matrix exist from the start: the largest rank you expect is enough"
        if in_flight:
            room = first_room(method, len(shapes), rank)
            self.facts["trainable_start"] = adapter_parameters(method, shapes, [room] * len(shapes))
            note = (
                f"matrices begin with room for {room} of adapter.rank={rank} rows and get more when they need it "
                "(speed.growth); memory is an upper bound: growth in the widest ones, and the moment when room is made"
            )
        self.report.notes.append(note)

    def memory(self) -> None:
        if not self.adapted or "ds_config" not in self.facts or "base_parameters" not in self.facts:
            return
        assert self.files is not None
        shapes = [shape for _, shape in self.adapted]
        base, shape = self.facts["base_parameters"], architecture(self.files.config)
        work = workload(self.run, base, shapes, shape, self.world_size, self.ranks)
        ds = summary(self.facts["ds_config"])
        self.facts["memory"] = {name: asdict(row) for name, row in estimate_stages(work, ds, self.world_size).items()}
        self.facts["this_run"] = asdict(estimate(work, ds, self.world_size))
        # fp32 masters and both moments, of everything that is trained
        self.facts["checkpoint_bytes"] = 12 * work.at(ds.stage).trainable
