"""The sweep file as JSON schema, for editors: completion, hover text and errors while one types. No torch.

It is made of the sweep's classes and of the run file's schema: an arm takes dotted keys of a run file
(``train.epochs``), whole sections, or a list of ``key=value``. Write it with ``salient-ds schema --sweep -o FILE``.
"""

from __future__ import annotations

import json
from typing import Any

from salient_ds.guide.schema import DIALECT, plain, run_schema
from salient_ds.sweep.spec import OWNED, SweepSpec

TITLE = "Sweep file of salient_ds"


def sweep_schema(built_in_only: bool = False) -> dict[str, Any]:
    """The JSON schema of a sweep file.

    Args:
        built_in_only: leave out methods of other packages.
    """
    run = run_schema(built_in_only)
    made = SweepSpec.model_json_schema(ref_template="#/definitions/{model}")
    own = made.pop("$defs")
    rates = own.pop("Arm")["properties"]["lr"]
    overrides = _overrides(run)
    pairs = {"type": "array", "items": {"type": "string", "pattern": "^[^=]+="}}
    arm = {"anyOf": [overrides | {"properties": overrides["properties"] | {"lr": rates}}, pairs, {"type": "null"}]}
    any_arm = {"$ref": "#/definitions/Arm"}
    metric, named = own.pop("Metric"), made["properties"]["metric"]
    unnamed = {"required": ["better"]}
    short = {"enum": ["loss", "perplexity"]}  # other metrics say which values are better
    metric |= {"anyOf": [unnamed, {"properties": {"name": short}}], "required": []}
    made["properties"]["metric"] = {"anyOf": [short, metric], "description": named["description"], "default": "loss"}
    made["properties"]["overrides"] = {
        "allOf": [any_arm, {"properties": {"lr": False}}],
        "description": made["properties"]["overrides"]["description"],
    }  # fmt: skip
    made["properties"]["arms"]["additionalProperties"] = any_arm
    widen = made["properties"]["widen"]
    made["properties"]["widen"] = {
        "anyOf": [{k: widen[k] for k in ("type", "minimum", "maximum")}, {"type": "boolean"}],
        "description": widen["description"], "default": widen["default"],
    }  # fmt: skip
    found = plain({"$schema": DIALECT, **made, "title": TITLE}, TITLE)
    found["definitions"] = run["definitions"] | plain(own, TITLE) | {"Arm": plain(arm, TITLE)}
    return dict(found)


def schema_text(built_in_only: bool = False) -> str:
    """:func:`sweep_schema` as JSON text."""
    return json.dumps(sweep_schema(built_in_only), indent=1, ensure_ascii=False) + "\n"


def _overrides(run: dict[str, Any]) -> dict[str, Any]:
    """A mapping of dotted keys and of sections of the run file."""
    found: dict[str, Any] = {}
    for section, schema in run["properties"].items():
        if section in OWNED:
            continue
        parts = _parts(schema, run["definitions"])
        keys: dict[str, Any] = {}
        for part in parts:
            for key, value in part.get("properties", {}).items():
                keys.setdefault(f"{section}.{key}", []).append(value)
        inside = {key: _any_of(values) for key, values in keys.items() if key not in OWNED}
        found |= {section: _section(section, schema, parts), **inside}
    deeper = r"^[a-z_]+\.[a-z_0-9]+\.."  # of a section in a section, such as adapter.orthogonality.form
    return {"type": "object", "properties": found, "patternProperties": {deeper: {}}, "additionalProperties": False}


def _parts(schema: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """The definitions that a section may follow: one, or one per method."""
    reference = schema.get("$ref") or next((part["$ref"] for part in schema.get("allOf", ()) if "$ref" in part), None)
    if reference is None:
        return [schema]
    found = definitions[reference.rpartition("/")[2]]
    branches = [part["then"]["$ref"] for part in found.get("allOf", ()) if "then" in part]
    return [definitions[name.rpartition("/")[2]] for name in branches] or [found]


def _section(section: str, schema: dict[str, Any], parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A whole section. The sweep may add keys to it, so that none but the method's name has to be there."""
    if len(parts) > 1 or "properties" not in parts[0]:
        return schema
    keys = {key: value for key, value in parts[0]["properties"].items() if f"{section}.{key}" not in OWNED}
    return {"type": "object", "properties": keys, "additionalProperties": False,
            "description": schema.get("description", "")}  # fmt: skip


def _any_of(values: list[Any]) -> Any:
    different = [value for index, value in enumerate(values) if value not in values[:index]]
    return different[0] if len(different) == 1 else {"anyOf": different}
