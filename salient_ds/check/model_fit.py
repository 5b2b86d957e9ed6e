"""Does the model fit the run: task, kernels, attention? And what is known of it before training. No torch."""

from __future__ import annotations

from salient_ds.check.built_model import BuiltModel, built_model, plain_model
from salient_ds.check.model_files import ModelFiles
from salient_ds.check.report import Report
from salient_ds.config.run import RunConfig
from salient_ds.models.families import family_problems, precision_problem
from salient_ds.models.kernels import kernel_problems
from salient_ds.models.meta_model import attention_problem
from salient_ds.models.packing import packing_problems


def fitting_model(run: RunConfig, files: ModelFiles, quick: bool, report: Report) -> BuiltModel | None:
    """What training will build; None if that is not known before. Adds what does not fit to the report's problems.

    Args:
        quick: start no other process.

    Raises:
        ValueError: transformers has no class of this model for the run's task.
    """
    unfit = family_problems(run.model.task, files.config, run.model.path)
    report.problems += kernel_problems(run.speed, files.config.get("model_type"))
    report.problems += packing_problems(run.model, files.config, run.data.max_length) if run.data.packing else []
    report.problems += unfit
    task, classes = run.data.task, 1
    if task is not None:
        classes = task.num_labels
    if files.problems or unfit:
        return plain_model(files.config, run.model.task, classes)
    closely = bool(run.adapter.also_train) or run.adapter.train_head is True
    built = built_model(run.model, files, quick, classes=classes, closely=closely)
    if not isinstance(built, BuiltModel):
        report.notes.append(
            f"the layers of this model are not known before training ({built}): targets, events, memory unchecked"
        )
        return None
    problem = attention_problem(run.model.attn_implementation, built.attention) if built.attention else None
    report.problems += [problem] if problem else []
    return built


def sharding_problems(run: RunConfig, files: ModelFiles | None, sharded_base: bool) -> list[str]:
    """Why ZeRO-3 cannot shard the base of this model: at most one sentence."""
    problem = precision_problem(files.config if files is not None else {}, run.train.precision, sharded_base)
    return [problem] if problem else []
