"""Section ``data`` of a run file: what is trained on, and how rows become tokens. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from salient_ds.config.data_sets import Format, TrainSet, as_sets, by_file
from salient_ds.data.tasks.base import Task
from salient_ds.data.tasks.table import task_of
from salient_ds.strict import Strict, did_you_mean


class DataConfig(Strict):
    """Section ``data`` of a run file."""

    train: str | list[TrainSet]
    """Training data: a .json, .jsonl, .csv or .parquet file, or a `datasets` name ("name", "name:config",
    "name[split]"). Or a pattern of files: `shards/*.parquet`. Or a list of these, with weights: `[{path: a.jsonl,
    weight: 2}, b.parquet]`."""
    eval: str | None = None
    """Held-out data, in the same form as `train`."""
    eval_size: float = Field(0, ge=0)
    """Without `eval`: hold out this many training rows, or this fraction of them if below 1. With `packing`, packed
    sequences are counted instead of rows. Of several data sets, a fraction is held out of each; a number is divided
    in proportion to their rows. 0: hold out nothing."""
    task: SerializeAsAny[Task] | None = None
    """A task with a metric: its name, such as "glue/mnli", "squad/v2" or "summarisation/xsum", or a description with
    `kind` (classification, regression, question-answering, summarisation) or `like` (the name of a task, whose fields
    it replaces). Without `train` and `eval`, the task's own data sets are used. Default: instruction data."""
    format: Format = "auto"
    """Format of the rows. auto: found from the keys of the first row that fits one of the formats. chosen: of
    preference pairs (prompt, chosen, rejected), the chosen answers are trained on; auto refuses such rows. text: plain
    text, every token of which is trained on, cut into blocks of max_length tokens."""
    template: str = "alpaca"
    """Prompt template: alpaca, vicuna_v1.1, llama-2, chatml, tokenizer (the tokenizer's own chat template), none
    (prompt and answer as they are, the end token after the answer), or fastchat:NAME (any template of FastChat)."""
    max_length: int = Field(512, gt=1)
    """Maximum number of tokens per example. Longer examples are cut on the right; the log says how many were cut. For
    summaries it limits the source, and question answering cuts longer contexts into windows of this length."""
    empty_answers: Literal["error", "skip"] = "error"
    """What to do with rows whose answer is empty (the published Alpaca file holds 28). error: refuse the file. skip:
    leave those rows out."""
    bad_rows: Literal["error", "skip"] = "error"
    """What to do with rows that cannot be trained on as they are: an answer first, a user turn last, tools or a system
    message that the template does not print, ... error: refuse the file, with counts by kind. skip: leave them out, and
    report the counts."""
    rewritten_history: Literal["per_answer", "last_answer"] = "per_answer"
    """For a tokenizer's chat template that rewrites earlier turns, such as Qwen3's, which drops the thoughts of earlier
    answers. per_answer: every answer becomes an example of its own, rendered as the last one, as the model writes it.
    last_answer: only the last answer of a conversation is trained on. Other templates are not concerned."""
    packing: bool = False
    """Pack several examples into one sequence of up to max_length tokens. They do not attend to each other. Models that
    were not tested to keep them apart are refused (salient_ds/models/README.md lists those that were)."""
    cache: bool = True
    """Tokenise a file or data set once per machine, keep the result in `cache_dir`, and map it into the memory of all
    processes. It is made anew when the rows, tokenizer, template, a setting of this section or our code changes. Tasks
    are not kept."""
    workers: int = Field(default=1, ge=1, le=256)
    """Processes that tokenise instruction data, for all processes of a machine together (without `cache`, for each of
    them). The rows are the same for any number. Each takes seconds to start, and needs a free core;
    there are never more than one per 1,024 rows."""
    cache_dir: str | None = None
    """Folder of the cache; its parts may be deleted at any time. Default: $SALIENT_DS_CACHE, else $HF_HOME/salient_ds,
    else ~/.cache/salient_ds."""

    @model_validator(mode="before")
    @classmethod
    def _own_data(cls, values: Any) -> Any:
        """Fill in the data sets of a task that has some."""
        if not isinstance(values, Mapping) or values.get("task") is None:
            return values
        try:
            task = task_of(values["task"])
        except ValueError:
            return {"train": "", **values}  # the field's own validator says what is wrong
        own = {"train": task.train} if values.get("train") is None and task.train else {}
        if own and values.get("eval") is None and task.eval and not values.get("eval_size"):
            own["eval"] = task.eval
        return {**values, **own}

    @field_validator("train", mode="before")
    @classmethod
    def _sets(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return as_sets([value])
        if not isinstance(value, str | list | tuple):
            raise ValueError(f"data.train={value!r}: give a file, the name of a data set, or a list of them")
        return value if isinstance(value, str) else as_sets(value)

    @property
    def sets(self) -> tuple[TrainSet, ...]:
        """The training data as a list of sets, of one if `train` is a path or a name. A pattern is a set per file."""
        named = (TrainSet(path=self.train),) if isinstance(self.train, str) else tuple(self.train)
        return tuple(file for one in named for file in by_file(one))

    @field_validator("task", mode="before")
    @classmethod
    def _known_task(cls, value: Any) -> Any:
        return value if value is None else task_of(value)


_INSTRUCTIONS_ONLY = ("format", "template", "empty_answers", "rewritten_history", "packing")


def task_problems(data: DataConfig, head: str) -> list[str]:
    """What of section ``data`` does not fit the task or ``model.task``: one sentence each, with value and remedy.

    Args:
        head: ``model.task``.
    """
    task = data.task
    if task is None:
        if head == "causal-lm":
            return []
        return [f"model.task={head} needs a task with labels: set data.task, or model.task=causal-lm"]
    problems = []
    if head != task.head:
        problems.append(f"data.task={task.name} needs model.task={task.head}, not {head}: set model.task={task.head}")
    if not isinstance(data.train, str):
        problems.append(
            f"data.train lists {len(data.train)} data sets, and data.task={task.name} takes one: join the files"
        )
    for name in _INSTRUCTIONS_ONLY:
        value = getattr(data, name)
        if value != DataConfig.model_fields[name].default:
            problems.append(
                f"data.{name}={value} is for instruction data, and nothing reads it with data.task: remove it"
            )
    return problems + task.length_problems(data.max_length, None)


def metric_problems(wanted: str | None, data: DataConfig) -> list[str]:
    """Why ``train.best_metric`` cannot be chosen by: at most one sentence."""
    known = ["loss", *(data.task.metrics if data.task is not None else ())]
    if wanted is None or wanted in known or (wanted == "auto" and data.task is not None):
        return []
    if wanted == "auto":
        return ["train.best_metric=auto is the metric of data.task, and there is no task: use loss"]
    hint = did_you_mean(wanted, known, before="; ")
    return [f"train.best_metric={wanted}: this run has {', '.join(known)}{hint}"]
