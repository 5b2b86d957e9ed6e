"""Refuses a run whose processes do not start from the same: settings, packages, data, template or base weights.

Nodes with files of their own would otherwise train on, each a run of its own, with averaged gradients that belong to
neither. What a process has is a plain dict of named values (its *facts*). One comparison costs an all-gather of 32
bytes if all are equal. Only when they differ are the main process' facts sent to all, and each process tells its
first difference.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import platform
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from salient_ds.config.run import RunConfig
from salient_ds.host import installed_version
from salient_ds.models.fingerprint import base_identity
from salient_ds.run.inputs import Inputs
from salient_ds.strict import Reported
from salient_ds.zero.collectives import all_equal, from_everyone, from_main, world
from salient_ds.zero.ds_json import load_ds_config

Facts = dict[str, Any]
"""Named values that JSON can hold, in the order in which differences are looked for; dicts may be nested. None
stands for a fact that this process does not know. It is not compared."""

_VERSIONS = ("torch", "deepspeed", "transformers", "tokenizers", "safetensors", "numpy", "salient_ds")
_SOURCES = ("salient_ds", "deepspeed")
_LARGE = ("torch", "transformers")
_CODE = "code"
_ABSENT = "absent"
_SHOWN = 100
"""Characters of a value in a message."""


class NodesDiffer(RuntimeError, Reported):
    """Processes of one run do not have the same. The message names the process, its host and the first difference."""


@dataclass(frozen=True)
class _Place:
    """What a process differs in from the main process; ``key`` is None if in nothing."""

    host: str
    key: str | None = None
    here: str = ""
    there: str = ""
    """On the main process."""


def environment_facts() -> dict[str, Any]:
    """Versions and hardware of this process, for run.json."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    known = {"host": socket.gethostname(), "python": platform.python_version(), "gpu": gpu}
    return known | {name: installed_version(name.replace("_", "-")) for name in _VERSIONS}


def setup_facts(config: RunConfig) -> Facts:
    """What this process has before it reads the data: packages, its run file, its ZeRO JSON and the base weights.

    Raises:
        OSError: a file of the base or the ZeRO JSON cannot be read.
    """
    base = base_identity(config.model, config.train.seed)
    return package_facts() | {
        "run file": config.model_dump(mode="json", by_alias=True),
        "ZeRO JSON": load_ds_config(config.deepspeed),
        "base weights": base.get("base weights"),
        "config.json of the base": base.get("config.json"),
    }


def package_facts() -> Facts:
    """Versions, a digest of the code of this package and of DeepSpeed, and the sizes of files of larger packages.

    A patch of PyTorch or transformers that leaves every size as it was goes unnoticed: reading them takes seconds.
    """
    return {
        "version": {"Python": platform.python_version()} | {name: installed_version(name) for name in _VERSIONS},
        _CODE: {name: _digest(sources(name))[:16] for name in _SOURCES},
        "sizes of the code": {name: _digest(sizes(name))[:16] for name in _LARGE},
    }


def data_facts(inputs: Inputs) -> Facts:
    """What this process has read: rows as they are trained on, and the template."""
    held_out = inputs.held_out
    return {
        "number of training rows": len(inputs.train),
        "number of held-out rows": 0 if held_out is None else len(held_out),
        "template": "none" if inputs.record is None else inputs.record.sha256,
        "labels": list(inputs.labels),
        "training data": inputs.train.fingerprint(),
        "held-out data": "none" if held_out is None else held_out.fingerprint(),
    }


def refuse_differing(facts: Facts, device: torch.device) -> None:
    """Compare the facts of all processes. All processes call it.

    Raises:
        NodesDiffer: on all processes, if one has another value than the main process for a fact that both know.
    """
    if world().world_size == 1 or all_equal(_digest(facts), device):
        return
    main_facts, main_host = from_main([facts, socket.gethostname()], device)
    difference = first_difference(main_facts, facts)
    there, here = ("", "") if difference is None else map(_shown, difference[1:])
    mine = _Place(socket.gethostname(), None if difference is None else difference.key, here, there)
    places: list[_Place] = from_everyone(mine)
    differing = {rank: place for rank, place in enumerate(places) if place.key is not None}
    if differing:
        raise NodesDiffer(describe(main_host, len(places), differing, _changed_file(differing, device)))


def describe(main_host: str, processes: int, differing: dict[int, _Place], file: str | None = None) -> str:
    """The message about processes that differ from the main process.

    Args:
        processes: number of all processes.
        differing: those that differ, by number; at least one.
        file: the first source file that differs, if code does.
    """
    rank, first = next(iter(differing.items()))
    text = f"process {rank} on {first.host} does not have what process 0 on {main_host} has: {first.key} is "
    text += f"{first.here} on process {rank} and {first.there} on process 0"
    text += f" (first file that differs: {file})" if file else ""
    alike = len({(place.key, place.here) for place in differing.values()}) == 1
    if len(differing) == processes - 1 > 1 and alike:
        text += f"; all others have what process {rank} has, so process 0 is the odd one"
    elif len(differing) > 1:
        hosts = ", ".join(dict.fromkeys(place.host for place in differing.values()))
        text += f"; {len(differing)} of {processes} processes differ from it, on {hosts[:300]}"
    return f"{text}: give all nodes the same settings, files and packages"


class Unequal(NamedTuple):
    """A fact by its name, and its two values."""

    key: str
    main: Any
    here: Any


def first_difference(main: Facts, here: Facts) -> Unequal | None:
    """The first fact that is not equal; None if there is none. A fact that is None at one place is not known there."""
    for key in [*main, *(key for key in here if key not in main)]:
        there, mine = main.get(key), here.get(key)
        if there is not None and mine is not None:
            found = next(_unequal(key, there, mine), None)
            if found is not None:
                return found
    return None


def _unequal(key: str, there: Any, mine: Any) -> Iterator[Unequal]:
    """Leaves of nested dicts that differ, by dotted name."""
    if isinstance(there, dict) and isinstance(mine, dict):
        for name in [*there, *(name for name in mine if name not in there)]:
            joint = "." if ": " in key else ": "
            yield from _unequal(f"{key}{joint}{name}", there.get(name, _ABSENT), mine.get(name, _ABSENT))
    elif there != mine:
        yield Unequal(key, there, mine)


def sources(package: str) -> dict[str, str]:
    """A digest of every ``.py`` file of an installed package, by its path in the package."""
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in _files(package)}


def sizes(package: str) -> dict[str, int]:
    """Bytes of every ``.py`` file of an installed package, by its path in the package."""
    return {name: path.stat().st_size for name, path in _files(package)}


def _files(package: str) -> list[tuple[str, Path]]:
    """Every ``.py`` file of an installed package with its path in the package, sorted."""
    found = importlib.util.find_spec(package)
    places = (found.submodule_search_locations if found else None) or []
    return sorted((path.relative_to(place).as_posix(), path) for place in places for path in Path(place).rglob("*.py"))


def _changed_file(differing: dict[int, _Place], device: torch.device) -> str | None:
    """The first source file in which the first differing process differs, if it differs in code."""
    rank, place = next(iter(differing.items()))
    package = (place.key or "").rpartition(": ")[2]
    if place.key not in (f"{_CODE}: {package}", f"sizes of the code: {package}"):
        return None
    mine: dict[str, Any] = dict(sources(package) if package in _SOURCES else sizes(package))
    (theirs,) = from_main([mine], device)
    found: list[str] = from_everyone(next((item.key for item in _unequal("", theirs, mine)), ""))
    return package + "/" + found[rank].removeprefix(": ")


def _digest(facts: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def agreed(make: Callable[[], Facts], device: torch.device) -> None:
    """Make the facts of this process, unless it is alone, and call :func:`refuse_differing`."""
    if world().world_size > 1:
        refuse_differing(make(), device)
