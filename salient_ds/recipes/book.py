"""All recipes, put together from the tables beside this file. No torch.

A table has a base (sections of a run file) and changes to it, by task, by method and by budget. For example,
``glue/mnli/adalora-r8`` is the base of GLUE with the changes of the task "mnli", of the method "adalora", of the budget
"r8", and of that method on that task, in this order. Keys of changes are dotted, as on the command line.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from salient_ds.config.run import RunConfig, parse_config
from salient_ds.guide.schema import language_server_line
from salient_ds.steps import total_steps
from salient_ds.strict import did_you_mean

TABLES = ("glue.yaml", "squad.yaml", "summarisation.yaml", "heterolora.yaml")
ZERO = "zero2.json"
"""The DeepSpeed JSON that all recipes name; it is written beside a recipe."""
RUN_HERE = "nothing so far"
"""What has been run of the recipes in this project. Numbers go into eval/records."""


@dataclass(frozen=True)
class Recipe:
    """One row of a paper's table as a run."""

    name: str
    model: str
    """The model's usual name, such as "DeBERTaV3-base"."""
    task: str
    method: str
    rows: int
    """Rows of the training split."""
    published: str
    """The published number, or why there is none."""
    source: str
    """Where the number or the settings are from: paper, table."""
    notes: tuple[str, ...]
    """What a user should know about the settings."""
    sections: Mapping[str, Any]
    """The run file."""

    def run(self) -> RunConfig:
        """The run file, validated. Raises ConfigError."""
        return parse_config(copy.deepcopy(dict(self.sections)))

    def text(self) -> str:
        """The complete run file, with a header that says what it is."""
        lines = [
            f"{self.name}: {self.model} on {self.task} with {self.method}.",
            f"command    deepspeed --num_gpus 1 --module salient_ds.train FILE {self._hint()}",
            f"published  {self.published}",
            f"source     {self.source}",
            f"run here   {RUN_HERE}",
            *self.notes,
        ]
        header = language_server_line() + "\n" + "".join(f"# {line}\n" for line in lines)
        return header + yaml.safe_dump(dict(self.sections), sort_keys=False, width=110, allow_unicode=True)

    def _hint(self) -> str:
        train = self.sections["train"]
        return f"(GPUs x micro_batch_size={train['micro_batch_size']} must divide {train['global_batch_size']})"


@cache
def recipes() -> dict[str, Recipe]:
    """All recipes by name, in the order of the tables."""
    found: dict[str, Recipe] = {}
    for name in TABLES:
        text = resources.files("salient_ds.recipes").joinpath(name).read_text(encoding="utf-8")
        for recipe in _of_table(yaml.safe_load(text)):
            assert recipe.name not in found, recipe.name
            found[recipe.name] = recipe
    return found


def recipe(name: str) -> Recipe:
    """The recipe of this name. Raises ValueError with the nearest name."""
    known = recipes()
    if name not in known:
        hint = did_you_mean(name, known, before="; ")
        raise ValueError(f"there is no recipe {name!r}{hint}; `salient-ds recipes` lists all {len(known)}")
    return known[name]


def zero_json() -> str:
    """The text of the DeepSpeed JSON that all recipes name."""
    return resources.files("salient_ds.recipes").joinpath(ZERO).read_text(encoding="utf-8")


def _of_table(table: Mapping[str, Any]) -> Iterator[Recipe]:
    for task, of_task in table["tasks"].items():
        for method, of_method in table["methods"].items():
            own = of_method["tasks"][task]
            for budget in of_method["budgets"]:
                name = f"{table['family']}/{task}/{method}{f'-{budget}' if budget else ''}"
                yield _put_together(table, of_task, of_method, own, budget, name)


def _put_together(
    table: Mapping[str, Any],
    of_task: Mapping[str, Any],
    of_method: Mapping[str, Any],
    own: Mapping[str, Any],
    budget: str,
    name: str,
) -> Recipe:
    sections = {"output_dir": f"runs/{name.replace('/', '-')}", "deepspeed": ZERO, **copy.deepcopy(table["base"])}
    changes = (of_task["set"], of_method["set"], of_method["budgets"][budget], own.get("set"))
    for change in (*changes, own.get("budgets", {}).get(budget)):
        for key, value in (change or {}).items():
            _change(sections, key, copy.deepcopy(value))
    if "allocation" in own:
        _rest_is_warmup(sections, of_task["rows"], own["allocation"])
    if sections["adapter"].get("shortcuts", ...) is None:
        del sections["adapter"]["shortcuts"]
    of_budget = own.get("notes", {}).get(budget)
    return Recipe(
        name=name,
        model=of_method.get("model", table["model"]),
        task=_task_name(sections["data"]["task"]),
        method=sections["method"]["name"],
        rows=of_task["rows"],
        published=_published(of_method, own, budget),
        source=of_method["source"],
        notes=(*table["notes"], *of_method.get("notes", ()), *([of_budget] if of_budget else [])),
        sections=sections,
    )


def _change(sections: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    place = sections
    for part in path:
        place = place[part]
    place[last] = value


def _rest_is_warmup(sections: dict[str, Any], rows: int, allocation: int) -> None:
    """Set the final warm-up to what the run has left after ``allocation`` steps in which ranks are decided."""
    train, method = sections["train"], sections["method"]
    total = total_steps(rows, train["global_batch_size"], train["epochs"])
    method["final_warmup"] = total - method["initial_warmup"] - allocation


def _published(of_method: Mapping[str, Any], own: Mapping[str, Any], budget: str) -> str:
    general = of_method.get("published", {})
    parts = [own.get("published", {}).get(budget), general.get("all"), general.get(budget)]
    return "; ".join(part for part in parts if part)


def _task_name(task: str | Mapping[str, Any]) -> str:
    return task if isinstance(task, str) else str(task["like"])
