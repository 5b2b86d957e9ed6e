"""The run file as JSON schema, for editors: completion, hover text and errors while one types. No torch.

The schema is made of the configuration classes. What it cannot say stays with ``salient-ds check``: rules between
keys, files that have to exist, and ``${section.key}`` where a number is expected.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from salient_ds.config.data import DataConfig
from salient_ds.config.run import RunConfig
from salient_ds.config.train import TrainConfig
from salient_ds.data.tasks.table import KINDS, NAMED
from salient_ds.methods.options import MethodConfig
from salient_ds.methods.table import methods

FILE = Path(__file__).with_name("run.schema.json")
"""The schema with the built-in methods, as it comes with the package. A test compares it with the classes."""
TITLE = "Run file of salient_ds"
DIALECT = "http://json-schema.org/draft-07/schema#"
"""Draft 7, which editors know best."""


def language_server_line(schema: str | Path = FILE) -> str:
    """The comment by which editors with yaml-language-server (VS Code, Neovim, ...) find the schema of a YAML file."""
    return f"# yaml-language-server: $schema={schema}"


def run_schema(built_in_only: bool = False) -> dict[str, Any]:
    """The JSON schema of a run file.

    Args:
        built_in_only: leave out methods of other packages.
    """
    known = {
        name: options
        for name, options in methods().items()
        if not built_in_only or options.__module__.startswith("salient_ds.")
    }
    classes: list[type[BaseModel]] = [
        RunConfig,
        MethodConfig,
        DataConfig,
        TrainConfig,
        *known.values(),
        *KINDS.values(),
    ]
    names, made = models_json_schema([(one, "validation") for one in classes], ref_template="#/definitions/{model}")
    parts = made["$defs"]
    of = {one: names[(one, "validation")]["$ref"].rpartition("/")[2] for one in classes}
    parts[of[MethodConfig]] = _by_key("name", {name: of[options] for name, options in known.items()})
    train, data = parts[of[TrainConfig]], parts[of[DataConfig]]
    train["anyOf"] = [{"required": ["epochs"]}, {"required": ["max_steps"]}]
    data["required"] = []
    data["anyOf"] = [{"required": ["train"]}, {"required": ["task"]}]  # a named task brings data sets of its own
    for kind in data["properties"]["train"]["anyOf"]:
        if "items" in kind:  # a path alone stands for a section with nothing but a path
            kind["items"] = {"anyOf": [{"type": "string"}, kind["items"]]}
    data["properties"]["task"] |= {"anyOf": _tasks({kind: of[options] for kind, options in KINDS.items()})}
    data["properties"]["task"].pop("$ref", None)
    pattern = parts["AdapterConfig"]["properties"]["rank_pattern"]
    text = pattern.pop("description"), pattern.pop("default")
    parts["AdapterConfig"]["properties"]["rank_pattern"] = {
        "anyOf": [{k: v for k, v in pattern.items() if k != "title"}, {"type": "string"}],
        "description": text[0],
        "default": text[1],
    }
    run = parts.pop(of[RunConfig])
    found = {"$schema": DIALECT, **run, "title": TITLE, "definitions": parts}
    return dict(plain(found, TITLE))


def schema_text(built_in_only: bool = False) -> str:
    """:func:`run_schema` as JSON text."""
    return json.dumps(run_schema(built_in_only), indent=1, ensure_ascii=False) + "\n"


def _by_key(key: str, definitions: dict[str, str]) -> dict[str, Any]:
    """A section whose ``key`` says which definition it follows. One error is shown then, not one per definition."""
    return {
        "type": "object",
        "properties": {key: {"enum": list(definitions)}},
        "required": [key],
        "allOf": [
            {
                "if": {"properties": {key: {"const": name}}, "required": [key]},
                "then": {"$ref": f"#/definitions/{definition}"},
            }
            for name, definition in definitions.items()
        ],
    }


def _tasks(kinds: dict[str, str]) -> list[dict[str, Any]]:
    like = {"type": "object", "properties": {"like": {"enum": list(NAMED)}}, "required": ["like"]}
    return [{"enum": list(NAMED)}, like, _by_key("kind", kinds), {"type": "null"}]


def plain(value: Any, title: str) -> Any:
    """Without pydantic's titles, which repeat the names of keys, and with descriptions in one line.

    Args:
        title: of the whole schema, which stays.
    """
    if isinstance(value, list):
        return [plain(item, title) for item in value]
    if not isinstance(value, dict):
        return value
    found = {
        key: plain(item, title)
        for key, item in value.items()
        if key != "title" or not isinstance(item, str) or item == title
    }
    if isinstance(found.get("description"), str):
        found["description"] = " ".join(found["description"].split())
    return found
