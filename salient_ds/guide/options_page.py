"""All options of a run file as one page of Markdown, made of the configuration classes. No torch.

``salient-ds options`` prints it. docs/options.md is this page; a test keeps it current:

    salient-ds options --built-in > docs/options.md
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from salient_ds.data.tasks.table import KINDS
from salient_ds.guide.schema import run_schema
from salient_ds.methods.table import methods
from salient_ds.strict import ConfigError, did_you_mean

_HEAD = """# Options of a run file

`salient-ds options --built-in` writes this page from the configuration classes. Do not edit it. `salient-ds options
KEY` prints one option or section, such as `train.lr`. On the command line, `key=value` replaces any of them:
`salient-ds train run.yaml train.lr=1e-4`. `salient-ds schema` prints the same as JSON schema, for editors.
"""
_BOUNDS = (
    ("exclusiveMinimum", "above"),
    ("minimum", "at least"),
    ("exclusiveMaximum", "below"),
    ("maximum", "at most"),
)


def options_page(built_in_only: bool = False) -> str:
    """The whole page."""
    parts = [_HEAD]
    for heading, note, rows in _sections(built_in_only):
        parts.append(f"## {heading}\n" + (f"\n{note}\n" if note else ""))
        parts.append(_table(rows) + "\n" if rows else "No options.\n")
    return "\n".join(parts)


def options_of(key: str) -> str:
    """One option, or all options under a prefix such as "train" or "method.adalora", as plain text.

    Raises:
        ConfigError: there is no such option; the message names the nearest.
    """
    found, known = [], []
    for heading, _, rows in _sections():
        section = heading.replace("`", "").replace(": ", ".")
        for name, kind, default, text in rows:
            full = name if section == "top level" else f"{section}.{name}"
            known.append(full)
            short = f"method.{name}" if section.startswith("method.") else full
            if full == key or full.startswith(f"{key}.") or short == key:
                found.append(f"{full}  ({kind}; {default})\n    {text}")
    if not found:
        raise ConfigError([f"there is no option {key!r}{did_you_mean(key, known, before='; ')}"])
    return "\n".join(found) + "\n"


Row = tuple[str, str, str, str]
"""Key, what it may be, default, meaning."""


def _sections(built_in_only: bool = False) -> Iterator[tuple[str, str, list[Row]]]:
    schema = run_schema(built_in_only)
    parts = schema["definitions"]
    own = {key: value for key, value in schema["properties"].items() if key in ("output_dir", "deepspeed")}
    yield "top level", "", _rows({"properties": own, "required": schema["required"]}, parts)
    for name in ("model", "adapter", "data", "train", "speed"):
        yield (
            f"`{name}`",
            _meaning(schema["properties"][name], parts),
            _rows(_part(schema["properties"][name], parts), parts),
        )
    for name, options in methods().items():
        if not built_in_only or options.__module__.startswith("salient_ds."):
            part = parts[options.__name__]
            note = "`method.name: " + name + "`. " + _first(part.get("description", ""))
            yield f"`method`: `{name}`", note.strip(), _rows(part, parts, leave=("name",))
    for kind, task in KINDS.items():
        yield (
            f"`data.task`: `{kind}`",
            f"`data.task.kind: {kind}`.",
            _rows(parts[task.__name__], parts, leave=("kind",)),
        )


def _first(text: str) -> str:
    return "" if text.startswith("Section ") else text


def _meaning(value: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    return str(value.get("description") or _part(value, parts).get("description", ""))


def _part(value: Mapping[str, Any], parts: Mapping[str, Any]) -> Mapping[str, Any]:
    """The definition that a property refers to, or an empty one."""
    for one in (value, *value.get("allOf", ()), *value.get("anyOf", ())):
        if "$ref" in one:
            found: Mapping[str, Any] = parts[one["$ref"].rpartition("/")[2]]
            return found
    return {}


def _rows(
    part: Mapping[str, Any], parts: Mapping[str, Any], prefix: str = "", leave: tuple[str, ...] = ()
) -> list[Row]:
    rows: list[Row] = []
    for key, value in part.get("properties", {}).items():
        if key in leave:
            continue
        inside = _part(value, parts)
        if "properties" in inside and key != "task":
            rows += _rows(inside, parts, f"{prefix}{key}.")
            continue
        needed = key in part.get("required", ())
        default = "required" if needed else f"default {_shown(value.get('default'))}"
        rows.append((prefix + key, kind_of_value(value), default, " ".join(_meaning(value, parts).split())))
        for one in value.get("anyOf", ()):
            rows += _rows(_part(one.get("items", {}), parts), parts, f"{prefix}{key}[].")
    return rows


def kind_of_value(value: Mapping[str, Any]) -> str:
    """What a property may be, in words: "number above 0", "auto or layer or none"."""
    if "enum" in value:
        return " or ".join(map(str, value["enum"]))
    if "const" in value:
        return str(value["const"])
    if "$ref" in value or "allOf" in value:
        return "section"
    if "anyOf" in value:
        kinds = [kind_of_value(one) for one in value["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    kind = value.get("type", "anything")
    if kind == "array":
        return f"list of {kind_of_value(value['items'])}" if "items" in value else "list"
    bounds = [f"{word} {value[key]:g}" for key, word in _BOUNDS if key in value]
    name = {"integer": "whole number", "boolean": "true or false", "string": "text", "object": "mapping"}.get(
        kind, kind
    )
    return " ".join([name, " and ".join(bounds)]).strip()


def _shown(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) and value else json.dumps(value)


def _table(rows: list[Row]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("<", "&lt;")

    lines = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for key, kind, default, text in rows:
        lines.append(f"| `{key}` | {cell(kind)} | {cell(default.removeprefix('default '))} | {cell(text)} |")
    return "\n".join(lines)
