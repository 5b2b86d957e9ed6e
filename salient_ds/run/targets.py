"""What ``salient-ds evaluate TARGET`` means (a run, an adapter, a model), and how it is scored. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from salient_ds.data.tasks.base import Task
from salient_ds.data.tasks.table import task_of
from salient_ds.own_files import read_object, read_settings, reading
from salient_ds.run.places import missing_folder

Kind = Literal["run", "adapter", "model"]
Split = Literal["eval", "test", "train"]
ADAPTER_FILES = ("adapter_config.json", "shortcut_adapter.json")
"""Settings of an exported adapter: of PEFT's form, and of our own form for shortcuts."""
RECORD = "salient_ds.json"
_LENGTH = 512
"""Tokens per example if nothing says how many."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of ``salient-ds evaluate`` on the command line."""

    task: str | None = None
    """Name of a task, or a YAML file that describes one."""
    data: str | None = None
    split: str = "eval"
    base: str | None = None
    baseline: bool = False
    output: str | None = None
    overwrite: bool = False
    batch: int = 32
    max_length: int | None = None
    precision: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Target:
    """A model to score, and on what."""

    place: str
    kind: Kind
    base: str
    """Path or hub name of the base model; of the model itself if it is one."""
    task: Task
    data: str
    labelled: bool
    max_length: int
    precision: str
    model: Mapping[str, Any]
    """Section ``model`` of the run, as far as there is one."""
    held_out: tuple[float, int] | None = None
    """``data.eval_size`` and ``train.seed`` of a run that holds out a part of its training data."""
    shortcut_norm: str | None = None


def target_of(place: str, options: EvaluateOptions) -> Target:
    """Find out what ``place`` is.

    Raises:
        ValueError: there is nothing of that kind, or nothing says which task or data to score it on.
    """
    folder = Path(place).expanduser()
    if (folder / "run.yaml").is_file():
        return _run_target(folder, options)
    problem = missing_folder(place)
    if problem is not None:
        raise ValueError(f"{problem}: give a run, an adapter or a model directory, or a model's hub name")
    facts = adapter_facts(folder) if folder.is_dir() else {}
    adapted = folder.is_dir() and is_adapter(folder)
    if folder.is_dir() and not adapted and not (folder / "config.json").is_file():
        raise ValueError(f"{place} is no run (run.yaml), adapter (adapter_config.json) or model (config.json)")
    record = facts.get("task") or {}
    task = _task(options, record.get("task"), place)
    base = (options.base or str(facts["base_model_name_or_path"])) if adapted else place
    data, labelled = _data(options, task, {}, place)
    length = options.max_length or record.get("max_length") or _LENGTH
    model = {} if not record else {"attn_implementation": record["attn_implementation"]}
    if adapted and options.base is None and facts.get("revision"):
        model["revision"] = facts["revision"]
    kind: Kind = "adapter" if adapted else "model"
    return Target(place, kind, base, task, data, labelled, length, options.precision or "fp32", model)


def _run_target(folder: Path, options: EvaluateOptions) -> Target:
    place = folder / "run.yaml"
    config = read_settings(place)
    with reading(place):
        data, model, train = config["data"], dict(config["model"]), config["train"]
        length, precision, base = int(data["max_length"]), str(train["precision"]), str(model["path"])
        seed, size = int(train["seed"]), float(data.get("eval_size") or 0)
        norm = (config["adapter"].get("shortcuts") or {}).get("norm_after_shortcut")
        trained_on = str(data["train"])
    task = _task(options, data.get("task"), str(folder))
    splits = options.split == "eval" and options.data is None and data.get("eval") is None and size
    source, labelled = (trained_on, True) if splits else _data(options, task, data, str(folder))
    return Target(
        str(folder), "run", options.base or base, task, source, labelled,
        options.max_length or length, options.precision or precision, model,
        (size, seed) if splits else None, norm,
    )  # fmt: skip


def _task(options: EvaluateOptions, known: Any, place: str) -> Task:
    if options.task is not None:
        path = Path(options.task).expanduser()
        if path.suffix in (".yaml", ".yml", ".json"):
            try:
                return task_of(yaml.safe_load(path.read_text(encoding="utf-8")))
            except (OSError, yaml.YAMLError) as error:
                raise ValueError(f"--task {options.task} cannot be read: {error}") from error
        return task_of(options.task)
    if known is None:
        raise ValueError(
            f"{place} does not say which task it is for: give --task, a name such as glue/rte or a YAML file"
        )
    return task_of(known)


def _data(options: EvaluateOptions, task: Task, data: Mapping[str, Any], place: str) -> tuple[str, bool]:
    """Where the rows are, and whether they must have labels."""
    if options.data is not None:
        return options.data, options.split != "test"
    found = {"eval": data.get("eval") or task.eval, "test": task.test, "train": data.get("train") or task.train}
    source = found[options.split]
    if not source:
        raise ValueError(
            f"{place} and task {task.name} name no data of split {options.split!r}: give it with --data FILE"
        )
    return str(source), options.split != "test"


def is_adapter(folder: Path) -> bool:
    """Whether ``folder`` is an exported adapter, ours or PEFT's."""
    return any((folder / name).is_file() for name in ADAPTER_FILES)


def adapter_facts(folder: Path) -> dict[str, Any]:
    """What an exported adapter or merged model says about itself, as far as it does."""
    found: dict[str, Any] = {}
    for name in (ADAPTER_FILES[0], RECORD):
        if (folder / name).is_file():
            found |= read_object(folder / name)
    return found


def baseline_of(target: Target) -> Target:
    """The base model of ``target`` by itself."""
    return replace(target, place=target.base, kind="model")
