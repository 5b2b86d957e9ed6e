"""The JSON schema and the options page: current, and of one mind with the configuration classes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from salient_ds.config.run import RunConfig, parse_config
from salient_ds.guide.options_page import options_of, options_page
from salient_ds.guide.schema import FILE, run_schema, schema_text
from salient_ds.methods.table import methods
from salient_ds.recipes.book import recipes
from salient_ds.strict import ConfigError

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted((ROOT / "launch" / "recipes").glob("*.yaml"))


CHECKER = jsonschema.Draft7Validator(run_schema(built_in_only=True))


def faults(run: Any) -> list[str]:
    return [error.message for error in CHECKER.iter_errors(run)]


def sound() -> dict[str, Any]:
    run: dict[str, Any] = yaml.safe_load(RECIPES[0].read_text())
    return run


def test_the_files_that_come_with_the_package_are_current() -> None:
    assert FILE.read_text() == schema_text(built_in_only=True), "salient-ds schema --built-in > " + str(FILE)
    page = (ROOT / "docs" / "options.md").read_text()
    assert page == options_page(built_in_only=True), "salient-ds options --built-in > docs/options.md"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_launch_recipes_fit_and_name_their_schema(path: Path) -> None:
    assert faults(yaml.safe_load(path.read_text())) == []
    named = path.read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / named).resolve() == FILE


def test_all_recipes_fit() -> None:
    for name, recipe in recipes().items():
        assert faults(dict(recipe.sections)) == [], name
    assert recipe.text().startswith("# yaml-language-server: $schema=" + str(FILE))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("train", "lrr", 1e-4),
        ("train", "lr", 0),
        ("train", "lr", "fast"),
        ("train", "precision", "int8"),
        ("adapter", "rank", 1.5),
        ("adapter", "rank_pattern", {"q_proj": -1}),
        ("method", "name", "salientlor"),
        ("method", "top_h", 3),  # of another method
        ("model", "task", "seq2seq"),
        ("data", "task", "glue/mnlli"),
        ("data", "task", {"kind": "classification"}),
        ("speed", "zero3", "all"),
    ],
)
def test_what_the_classes_refuse_by_a_key_the_schema_refuses(section: str, key: str, value: Any) -> None:
    run = sound()
    run.setdefault(section, {})[key] = value
    assert faults(run)
    with pytest.raises(ConfigError):
        parse_config(copy.deepcopy(run))


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("data", {"task": "glue/mnli"}),
        ("data", {"train": "rows.csv", "task": {"like": "squad/v2", "stride": 64}}),
        ("adapter", {"rank": 8, "rank_pattern": "runs/other"}),
        ("adapter", {"rank": 8, "shortcuts": None, "target_modules": "re:.*q_proj"}),
        ("train", {"max_steps": 5, "global_batch_size": 1, "micro_batch_size": 1, "lr": 1, "save_every": "90s"}),
        ("speed", {"compile_layers": "auto"}),
    ],
)
def test_forms_that_validators_turn_into_others_fit(section: str, value: Any) -> None:
    assert faults(sound() | {section: value}) == []


def test_every_section_and_method_is_asked_for_by_name() -> None:
    for key in ("output_dir", "model", "adapter", "method", "data", "train"):
        run = sound()
        del run[key]
        assert faults(run), key
    assert faults(sound() | {"train": {"global_batch_size": 1, "micro_batch_size": 1, "lr": 1}})  # no length
    page = options_page(built_in_only=True)
    for name, options in methods().items():
        if not options.__module__.startswith("salient_ds."):
            continue
        section = page.partition(f"## `method`: `{name}`")[2].partition("\n## ")[0]
        for field, info in options.model_fields.items():
            assert field == "name" or f"| `{info.alias or field}" in section, (name, field)


def test_every_key_of_a_run_is_explained() -> None:
    schema = run_schema(built_in_only=True)
    for section in RunConfig.model_fields:
        inside = schema["properties"][section]
        assert inside.get("description"), section
    for part in ("TrainConfig", "SpeedConfig", "DataConfig"):
        for key, value in schema["definitions"][part]["properties"].items():
            assert value.get("description"), (part, key)


def test_one_option_as_text() -> None:
    assert "Peak learning rate" in options_of("train.lr")
    assert len(options_of("speed").splitlines()) == 2 * len(
        json.loads(FILE.read_text())["definitions"]["SpeedConfig"]["properties"]
    )
    assert "method.adalora" in options_of("method.adalora")
    with pytest.raises(ConfigError, match=r"no option 'train.lrr'; did you mean 'train.lr'\?"):
        options_of("train.lrr")
