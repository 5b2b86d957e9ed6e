"""Absurd variants of files: values that no field expects, damaged structure, damaged bytes."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 10**9, 10**18, 2**63, -(2**63) - 1, 10**400, 0.0, -0.0, 1e-300, 1e300, 0.5, 1.5,
    float("inf"), float("-inf"), float("nan"), "", " ", "auto", "none", "1", "-1", "1e999", "nan", "é", "\x00",
    "\ud800", "a" * 5000, "../../etc/passwd", "~", "~nobody-of-that-name/x", "/", "${oc.env:HOME}", "${x}", "${",
    "re:(", "re:(a+)+$", "preset:none", "fastchat:none", "hub/name", "x\ny", [], [[]], [None], [1, 2, 3], ["q_proj", 5],
    {}, {"": ""}, {"a": {"b": {"c": []}}}, {"name": "lora"}, {"name": None}, {1: 2},
)  # fmt: skip


def deep(levels: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in plain data."""
    found = [path] if path else []
    if isinstance(data, dict):
        for key, value in data.items():
            found += places(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data[:8]):
            found += places(value, (*path, index))
    return found


def value(draw: random.Random) -> Any:
    """One of the values, as an object of its own: whoever changes it later leaves the others as they are."""
    return copy.deepcopy(draw.choice(VALUES))


def changed(data: Any, draw: random.Random) -> Any:
    """A copy of plain data with one to three values replaced, removed, renamed or added."""
    data = copy.deepcopy(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        found = places(data)
        if not found:
            return value(draw)
        path = draw.choice(found)
        parent = data
        for step in path[:-1]:
            parent = parent[step]
        last, kind = path[-1], draw.random()
        if kind < 0.7:
            parent[last] = deep(draw.choice((3, 60, 400))) if draw.random() < 0.03 else value(draw)
        elif kind < 0.8:
            del parent[last]
        elif isinstance(parent, dict):
            name = f"{last}x" if kind < 0.9 else str(value(draw))[:40]
            parent[name] = parent.pop(last) if kind < 0.9 else value(draw)
        else:
            parent.append(value(draw))
    return data


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Content with flipped, removed, doubled or inserted bytes."""
    out = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        at = draw.randrange(len(out) + 1)
        kind = draw.random()
        if kind < 0.4 and at < len(out):
            out[at] ^= 1 << draw.randrange(8)
        elif kind < 0.55:
            del out[at : at + draw.choice((1, 2, 30, 10**6))]
        elif kind < 0.7:
            out[at:at] = out[at : at + draw.randrange(1, 200)]
        else:
            out[at:at] = draw.choice(
                (b"\x00", b"\xff", b"\xef\xbb\xbf", b"\n", b"\t", b"&a ", b"*a", b"!!python/object:os.system x",
                 b"9" * 5000, b"[" * 1500, b"{", b"}", b'"', b"'", b": ", b"- ", b"\xed\xa0\x80", b"#",
                 b"%YAML 9\n---\n", b"NaN", b"e999")
            )  # fmt: skip
    return bytes(out)


def as_json(data: Any) -> bytes:
    """Plain data as JSON bytes, lone surrogates and numbers of hundreds of digits included."""
    return json.dumps(data, default=str, skipkeys=True).encode()


def as_yaml(data: Any) -> bytes:
    """Plain data as YAML, as far as that exists."""
    import yaml

    try:
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=False).encode("utf-8", "surrogatepass")
    except (yaml.YAMLError, RecursionError):
        return as_json(data)
