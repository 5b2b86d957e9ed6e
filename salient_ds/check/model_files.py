"""Inspects a checkpoint directory before processes start: is it complete, and which tensors does it hold?

No torch. Only headers are read: eight bytes and a JSON table of a safetensors file, the directory at the end of a .bin.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from salient_ds.check.model_shapes import derived_parameters
from salient_ds.config.run import ModelConfig

_MAX_HEADER = 100_000_000
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
         "F8_E8M0": 8,
         "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64,
         "U64": 64, "C64": 64}  # fmt: skip
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Models that transformers builds from Conv1D, not nn.Linear. They have no layer that an adapter can wrap."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its safetensors header describes it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str


@dataclass
class ModelFiles:
    """What was found. ``problems`` stop a run; ``notes`` say what could not be checked."""

    source: str
    directory: Path | None = None
    directory_is_cache: bool = False
    """Whether the directory is a snapshot in the hub cache, where files may still be missing."""
    config: dict[str, Any] = field(default_factory=dict)
    weights: Literal["safetensors", "bin", "random", "unchecked"] = "unchecked"
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def parameters(self) -> int | None:
        """Number of parameters (elements) of the base model; None if unknown."""
        if self.tensors:
            return sum(prod(info.shape) for info in self.tensors.values())
        return derived_parameters(self.config)


def inspect_model(model: ModelConfig) -> ModelFiles:
    """Find the checkpoint that ``model.path`` names, and check it. This never uses the network."""
    path = Path(model.path).expanduser()
    if path.is_dir():
        found = ModelFiles(source=str(path), directory=path)
        _read_config(found)
        _read_weights(found, model.random_weights)
        return found
    if looks_like_a_path(model.path):
        kind = "is a file" if path.exists() else "does not exist"
        return ModelFiles(
            source=model.path,
            problems=[f"model.path={model.path!r} {kind}: give a checkpoint directory or a hub name like org/name"],
        )
    return _inspect_hub_name(model)


def looks_like_a_path(text: str) -> bool:
    """Whether a user who wrote ``text`` meant a directory rather than a hub name."""
    return text.startswith((".", "/", "~")) or text.endswith("/") or text.count("/") > 1 or Path(text).exists()


def _inspect_hub_name(model: ModelConfig) -> ModelFiles:
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    found = ModelFiles(source=model.path)
    try:
        cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    except HFValidationError as error:
        found.problems.append(f"model.path={model.path!r} is neither a directory nor a hub name: {error}")
        return found
    if not isinstance(cached, str):
        text = f"model.path={model.path!r} is no directory here and not in the hub cache"
        if constants.is_offline_mode():
            found.problems.append(f"{text}, and HF_HUB_OFFLINE is set: give a checkpoint directory")
        else:
            found.notes.append(f"{text}: it is downloaded when training starts; nothing about it was checked")
        return found
    found.directory, found.directory_is_cache = Path(cached).parent, True
    _read_config(found)
    in_cache = ModelFiles(source=model.path, directory=found.directory, config=found.config)
    _read_weights(in_cache, model.random_weights)
    if in_cache.problems:
        found.notes.append(f"the weights of {model.path!r} are not all in the hub cache: the rest is downloaded")
    else:
        found.weights, found.tensors, found.notes = in_cache.weights, in_cache.tensors, in_cache.notes
    return found


def _read_config(found: ModelFiles) -> None:
    assert found.directory is not None
    path = found.directory / "config.json"
    config = _read_json(path, found, "a Hugging Face checkpoint directory has one")
    found.config = config if isinstance(config, dict) else {}
    if "quantization_config" in found.config:
        found.problems.append(f"{path} says that the model is quantised: give the unquantised checkpoint")
    if found.config.get("model_type") in _CONV1D_MODELS:
        found.problems.append(
            f"{path}: model_type={found.config['model_type']!r} is built from Conv1D layers, not nn.Linear: "
            "adapters cannot wrap them, choose another model"
        )


def _read_json(path: Path, found: ModelFiles, why: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        found.problems.append(f"{path} is missing: {why}")
    except (ValueError, OSError) as error:
        found.problems.append(f"{path} cannot be read: {error}")
    return None


def _read_weights(found: ModelFiles, random_weights: bool) -> None:
    assert found.directory is not None
    if random_weights:
        found.weights = "random"
        return
    # the order in which transformers looks for weights
    for name, reader in (
        ("model.safetensors", _read_single),
        ("model.safetensors.index.json", _read_index),
        ("pytorch_model.bin", _read_bin),
        ("pytorch_model.bin.index.json", _read_bin_index),
    ):
        if (found.directory / name).exists():
            found.weights = "safetensors" if "safetensors" in name else "bin"
            reader(found, found.directory / name)
            return
    found.problems.append(
        f"{found.directory} holds no weights (model.safetensors, pytorch_model.bin or an index of shards): complete "
        "the download, or set model.random_weights=true to measure speed only"
    )


def _read_single(found: ModelFiles, path: Path) -> None:
    found.tensors.update(_safetensors_header(path, found.problems) or {})


def _read_index(found: ModelFiles, path: Path) -> None:
    weight_map = _weight_map(found, path)
    for file in dict.fromkeys(weight_map.values()):
        shard = path.parent / file
        wanted = [name for name, holder in weight_map.items() if holder == file]
        if not shard.exists():
            found.problems.append(
                f"{shard} is missing: {path.name} names it for {len(wanted)} tensors; download it again"
            )
            continue
        header = _safetensors_header(shard, found.problems)
        if header is None:
            continue
        found.tensors.update(header)
        absent = [name for name in wanted if name not in header]
        if absent:
            found.problems.append(
                f"{shard} does not hold {absent[0]!r}"
                + (f" and {len(absent) - 1} other tensors" if len(absent) > 1 else "")
                + f", which {path.name} says it does: index and shards are of different versions"
            )


def _weight_map(found: ModelFiles, path: Path) -> dict[str, str]:
    index = _read_json(path, found, "it lists the shards")
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if isinstance(weight_map, dict) and weight_map:
        return weight_map
    if index is not None:
        found.problems.append(f'{path} has no "weight_map": download it again')
    return {}


def _safetensors_header(path: Path, problems: list[str]) -> dict[str, TensorInfo] | None:
    """Tensors by name. Adds a problem and returns None if the file is not safetensors, or not as its header says."""
    actual = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start.startswith(b"version "):
            problems.append(f"{path} is a git-lfs pointer of {actual} bytes, not the weights: run `git lfs pull`")
            return None
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if len(start) == 8 and length > _MAX_HEADER:
            problems.append(f"{path} is not a safetensors file (its header would be {length} bytes)")
            return None
        text = file.read(length)
    if len(start) < 8 or len(text) < length:
        problems.append(f"{path} is truncated: expected more than {8 + length} bytes, it has {actual}")
        return None
    try:
        table: Mapping[str, Any] = json.loads(text)
        entries = {name: entry for name, entry in table.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        tensors = {n: TensorInfo(n, e["dtype"], tuple(e["shape"]), path.name) for n, e in entries.items()}
        spans = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        problems.append(f"{path} is not a safetensors file (its header is not the expected JSON): download it again")
        return None
    expected = 8 + length + end
    if actual != expected:
        word = "truncated" if actual < expected else "too long"
        problems.append(f"{path} is {word}: expected {expected} bytes, it has {actual}; download it again")
        return None
    for name, info in tensors.items():
        bits = _BITS.get(info.dtype)
        if bits is not None and spans[name] * 8 != prod(info.shape) * bits:
            problems.append(f"{path}: tensor {name!r} of shape {info.shape} and {info.dtype} has {spans[name]} bytes")
            return None
    return tensors


def _read_bin(found: ModelFiles, path: Path) -> None:
    if zipfile.is_zipfile(path):
        found.notes.append(f"{path.name} is a pickle: its tensors are not checked before training starts")
    elif _first_bytes(path) == b"\x80\x02":
        found.notes.append(f"{path.name} is in torch's old format: nothing in it is checked before training starts")
    else:
        size = path.stat().st_size
        found.problems.append(
            f"{path} ({size} bytes) is not readable as a torch file, truncated perhaps: download it again"
        )


def _read_bin_index(found: ModelFiles, path: Path) -> None:
    for file in dict.fromkeys(_weight_map(found, path).values()):
        if (path.parent / file).exists():
            _read_bin(found, path.parent / file)
        else:
            found.problems.append(f"{path.parent / file} is missing: {path.name} names it; download it again")


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(2)
