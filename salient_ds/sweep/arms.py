"""From the base run file and an arm's overrides to the run file of one run, and what tells two arms apart."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from salient_ds.config.yaml_files import read_yaml
from salient_ds.host import file_sha256
from salient_ds.strict import ConfigError
from salient_ds.sweep.spec import Arm, SweepSpec

_FILES = (("deepspeed",), ("data", "train"), ("data", "eval"))
_PATHS = (*_FILES, ("model", "path"), ("model", "tokenizer"))
"""Keys that may name local files or folders."""

Mapped = dict[str, Any]


def find_run(spec: SweepSpec, spec_path: Path) -> Path:
    """The base run file.

    Raises:
        ConfigError: it is neither in the working directory nor beside the sweep file.
    """
    for place in (Path(spec.run).expanduser(), spec_path.parent / spec.run):
        if place.is_file():
            return place
    raise ConfigError(
        [f"run={spec.run!r} does not exist, neither in {Path.cwd()} nor in {spec_path.parent.resolve()}: correct it"]
    )


def arm_runs(spec: SweepSpec, spec_path: Path) -> dict[str, Mapped]:
    """Arm -> sections of its run file, without learning rate, seed and output directory. Local paths are absolute.

    Raises:
        ConfigError: the base run file cannot be read.
    """
    place = find_run(spec, spec_path)
    base = apply(read_yaml(place), spec.overrides)
    return {name: with_absolute_paths(apply(base, arm), place.parent) for name, arm in spec.arms.items()}


def apply(base: Mapping[str, Any], arm: Arm) -> Mapped:
    """The base with the arm's overrides.

    Whole sections come first and replace the base's. Then single keys are set. A single ``method.name`` that differs
    from the base's begins a new section, because every method has options of its own.
    """
    run = copy.deepcopy(dict(base))
    single = {}
    for key, value in arm.overrides.items():
        if "." in key:
            single[key] = value
        else:
            run[key] = copy.deepcopy(value)
    method = run.get("method")
    if "method" not in arm.overrides and isinstance(method, Mapping):
        name = single.get("method.name", method.get("name"))
        run["method"] = {"name": name} if name != method.get("name") else method
    for key, value in single.items():
        _set(run, key, copy.deepcopy(value))
    run.pop("output_dir", None)
    if isinstance(run.get("train"), dict):
        run["train"] = {name: value for name, value in run["train"].items() if name not in ("lr", "seed")}
    return run


def _set(run: Mapped, key: str, value: Any) -> None:
    *sections, last = key.split(".")
    here = run
    for section in sections:
        if not isinstance(here.get(section), dict):
            here[section] = {}
        here = here[section]
    here[last] = value


def with_absolute_paths(run: Mapped, folder: Path) -> Mapped:
    """The run with local paths that do not depend on the working directory. Names on a hub stay as they are.

    Args:
        folder: where the DeepSpeed JSON is looked for, if it is not in the working directory.
    """
    run = copy.deepcopy(run)
    for key in _PATHS:
        for holder, name, value in list(_texts(run, key)):
            places = [Path(value).expanduser()] + ([folder / value] if key == ("deepspeed",) else [])
            found = next((place for place in places if place.exists()), None)
            if found is not None:
                holder[name] = str(found.resolve())
    return run


def _texts(run: Mapped, key: tuple[str, ...]) -> Iterator[tuple[Any, Any, str]]:
    """Texts under a key, each with its holder and its name there. ``data.train`` may be a list of paths or sections."""
    holder, value = _holder(run, key), _get(run, key)
    if isinstance(value, str):
        yield holder, key[-1], value
    for number, item in enumerate(value if isinstance(value, list) else []):
        if isinstance(item, str):
            yield value, number, item
        elif isinstance(item, dict) and isinstance(item.get("path"), str):
            yield item, "path", item["path"]


def _holder(run: Mapped, key: tuple[str, ...]) -> Mapped | None:
    here: Any = run
    for part in key[:-1]:
        here = here.get(part) if isinstance(here, dict) else None
    return here if isinstance(here, dict) else None


def _get(run: Mapped, key: tuple[str, ...]) -> Any:
    holder = _holder(run, key)
    return None if holder is None else holder.get(key[-1])


def job_run(arm_run: Mapping[str, Any], lr: float, seed: int, output_dir: Path, held_out: Path | None = None) -> Mapped:
    """The run file of one run of an arm. ``held_out`` replaces the held-out data of the arm."""
    run = {"output_dir": str(output_dir)} | dict(arm_run)
    run["train"] = _section(run, "train") | {"lr": lr, "seed": seed}
    if held_out is not None:
        run["data"] = _section(run, "data") | {"eval": str(held_out)}
    return run


def fresh_data(spec: SweepSpec, spec_path: Path) -> Path | None:
    """The held-out file of runs on fresh seeds, if the sweep file names one.

    Raises:
        ConfigError: it is neither in the working directory nor beside the sweep file.
    """
    if spec.fresh_eval is None:
        return None
    for place in (Path(spec.fresh_eval).expanduser(), spec_path.parent / spec.fresh_eval):
        if place.is_file():
            return place.resolve()
    raise ConfigError([
        f"fresh_eval={spec.fresh_eval!r} does not exist, neither in {Path.cwd()} nor in {spec_path.parent.resolve()}: "
        "correct it"
    ])  # fmt: skip


def _section(run: Mapping[str, Any], name: str) -> Mapped:
    found = run.get(name)
    return dict(found) if isinstance(found, Mapping) else {}


def fingerprint(run: Mapping[str, Any], held_out: Path | None = None) -> Mapped:
    """Everything that the runs of an arm depend on: its sections, with files replaced by digests of their contents.

    Args:
        held_out: the data that runs on fresh seeds are judged on, if they have their own.
    """
    found = copy.deepcopy(dict(run))
    if held_out is not None:
        found["fresh_eval"] = f"sha256:{_digest(str(held_out))}"
    for key in _FILES:
        for holder, name, value in list(_texts(found, key)):
            if Path(value).is_file():
                holder[name] = f"sha256:{_digest(value)}"
    made: Mapped = json.loads(json.dumps(found, sort_keys=True, default=str))
    return made


_digests: dict[tuple[str, int, int], str] = {}


def _digest(path: str) -> str:
    """sha256 of a file, computed once per process."""
    state = Path(path).stat()
    key = (path, state.st_size, state.st_mtime_ns)
    if key not in _digests:
        _digests[key] = file_sha256(Path(path))[:16]
    return _digests[key]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, as ``key: OLD before, NEW now``."""
    before, now = dict(_flat(old)), dict(_flat(new))
    keys = [*before, *(key for key in now if key not in before)]
    return [
        f"{key}: {before.get(key, 'not set')!r} before, {now.get(key, 'not set')!r} now"
        for key in keys
        if key not in before or key not in now or before[key] != now[key]
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
