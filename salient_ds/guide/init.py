"""``salient-ds init``: writes a run file that fits model, data and GPUs, and checks it. No torch in this process."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from salient_ds.check.fit import fitting, unknown_layers
from salient_ds.check.model_files import inspect_model
from salient_ds.check.preflight import preflight
from salient_ds.check.report import Report
from salient_ds.check.start import StartOptions, check_start
from salient_ds.check.tokenizer_files import has_chat_template
from salient_ds.config.run import ModelConfig, RunConfig, load_config
from salient_ds.guide.answers import Answers
from salient_ds.guide.run_text import Plan, run_text, target_modules
from salient_ds.guide.zero_files import zero_text
from salient_ds.methods.table import methods
from salient_ds.steps import total_steps
from salient_ds.strict import ConfigError
from salient_ds.zero.ds_json import load_ds_config, resolve_ds_config, summary

LONGEST = 2048
"""``data.max_length`` is never chosen above this."""
EPOCHS, FEWEST_STEPS = 3, 40
"""Passes over the data, or more if they are fewer steps than this: methods need steps to observe before they decide."""


def refuse_present(output: Path) -> None:
    """Raise ConfigError if the run file is there already, or its folder is not."""
    if output.exists():
        raise ConfigError([f"{output} is there already, and init overwrites nothing: choose another file with -o"])
    if not output.parent.is_dir():
        raise ConfigError([f"there is no folder {output.parent} for {output.name}: create it, or choose another place"])


def write_run(answers: Answers, output: Path) -> tuple[RunConfig, Report, list[str]]:
    """Choose, check, and write the run file with its DeepSpeed JSON beside it.

    Returns:
        The run, the report of its check, and sentences about what could not be chosen. If the report has problems,
        nothing was written.

    Raises:
        ConfigError: a file is there already, or the model or the data cannot be used.
    """
    refuse_present(output)
    found = inspect_model(ModelConfig(path=answers.model))
    if found.problems:
        raise ConfigError([problem.replace("model.path=", "--model ") for problem in found.problems])
    modules = target_modules(found.config.get("model_type"))
    chat = found.directory is not None and has_chat_template(found.directory)
    template = "tokenizer" if chat else "alpaca"
    positions = found.config.get("max_position_embeddings")
    longest = min(LONGEST, positions) if isinstance(positions, int) and positions > 1 else LONGEST
    plan = Plan("zero2" if answers.gpus else "cpu", template, longest, "", 0, answers.processes, None)
    plan = _with_data(answers, plan, modules)
    unknown = [what for what, value in (("the model", plan.matrices), ("the data", plan.steps)) if value is None]
    suggested = methods()[answers.method].suggested(1, 1, answers.target_rank)
    if unknown and suggested:
        raise ConfigError([
            f"--method {answers.method}: {', '.join(f'method.{key}' for key in suggested)} follow from the number of "
            f"matrices and of steps, and {' and '.join(unknown)} could not be looked at: give local files, or begin "
            "with a recipe of that method"
        ])  # fmt: skip
    plan, notes = _with_memory(answers, plan, modules)
    text, zero = run_text(answers, plan, modules).replace("train FILE", f"train {output}"), zero_text(plan.zero)
    run, report = _checked(answers, text, plan.zero, output)
    json_file = output.parent / f"{plan.zero}.json"
    if json_file.exists() and json_file.read_text(encoding="utf-8", errors="replace") != zero:
        raise ConfigError([f"{json_file} is there already and holds something else: write to another folder with -o"])
    if not report.problems:
        if not json_file.exists():
            _create(json_file, zero)
        _create(output, text)
    return run, report, notes


def _create(path: Path, text: str) -> None:
    with path.open("x", encoding="utf-8") as file:
        file.write(text)


def _checked(answers: Answers, text: str, zero: str, output: Path) -> tuple[RunConfig, Report]:
    """Check the run file as if it were in its place."""
    with tempfile.TemporaryDirectory() as folder:
        run = _loaded(text, zero, Path(folder))
        return run, check_start(run, StartOptions(answers.processes), str(output))


def _loaded(text: str, zero: str, folder: Path) -> RunConfig:
    (folder / f"{zero}.json").write_text(zero_text(zero), encoding="utf-8")
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return load_config(folder / "run.yaml")


def _with_data(answers: Answers, plan: Plan, modules: str) -> Plan:
    """Lengths, held-out rows and batch that fit the data, if it is here."""
    with tempfile.TemporaryDirectory() as folder:
        run = _loaded(run_text(answers, plan, modules), plan.zero, Path(folder))
        report = check_start(run, StartOptions(answers.processes))
    length, why = min(512, plan.max_length), "a usual value: the data was not tokenised"
    tokens = report.facts.get("tokens")
    if tokens and tokens["lengths"]:
        at_99 = tokens["lengths"]["99"]
        length = min(plan.max_length, -(-(at_99 + 1) // 32) * 32)
        why = f"99 % of the examples have at most {at_99}"
    if report.memory_inputs is not None:
        plan = replace(plan, matrices=len(report.memory_inputs.layout.modules))
    rows = report.facts.get("rows")
    held_out = 0 if rows is None or rows < 20 else min(200, max(8, rows // 50))
    wanted = 32 if answers.gpus else 16
    if rows is not None:
        wanted = max(1, min(wanted, (rows - held_out) // 8))  # at least eight steps per epoch
    batch = -(-wanted // answers.processes) * answers.processes
    plan = replace(plan, max_length=length, max_length_why=why, held_out=held_out, global_batch_size=batch)
    if rows is None:
        return plan
    epochs = max(EPOCHS, -(-FEWEST_STEPS * batch // max(1, rows - held_out)))
    steps = total_steps(max(1, rows - held_out), batch, epochs)
    return replace(plan, epochs=epochs, steps=steps, eval_every=max(1, min(100, steps // 4)))


def _with_memory(answers: Answers, plan: Plan, modules: str) -> tuple[Plan, list[str]]:
    """ZeRO stage, micro-batch and recomputation by the estimate of ``check``.

    Raises:
        ConfigError: nothing fits.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = _loaded(run_text(answers, plan, modules), plan.zero, Path(folder))
        report = preflight(run, answers.processes, quick=True)
        inputs = report.memory_inputs
        if inputs is None:
            return plan, ["nothing is known about the model before it is downloaded: micro_batch_size is 1, raise it"]
        if (unknown := unknown_layers(inputs.architecture)) is not None:
            return plan, [unknown]
        ds = summary(resolve_ds_config(load_ds_config(run.deepspeed), run, answers.processes, None))
        choice = fitting(run, inputs, ds, answers.processes, answers.memory)
    if choice is None:
        raise ConfigError([
            f"nothing fits into {answers.memory / 2**30:.0f} GiB, not even one example of {plan.max_length} tokens "
            "with ZeRO-3 and everything on the host: choose a smaller model or more GPUs"
        ])  # fmt: skip
    return replace(plan, choice=choice, zero=choice.zero if answers.gpus else "cpu"), []
