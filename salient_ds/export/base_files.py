"""The weight files of a Hugging Face checkpoint directory, read tensor by tensor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from salient_ds.strict import nearest

_LAYOUTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("trainer_state.json", "adapter_config.json", "salient_ds.json")
_LISTED = 8  # names shown in an error before "and N more"


@dataclass(frozen=True)
class BaseFiles:
    """Which file of ``folder`` holds which tensor."""

    folder: Path
    file_of: dict[str, str]
    """Tensor name -> file name."""

    @property
    def shards(self) -> list[str]:
        """File names in sorted order, which is the order of their numbers."""
        return sorted(set(self.file_of.values()))

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, in the stored dtype."""
        path = self.folder / self.file_of[key]
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(key)
                return tensor
        return load_bin(path)[key]

    def config(self) -> dict[str, Any]:
        """``config.json``; empty if there is none."""
        path = self.folder / "config.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def load_bin(path: Path) -> dict[str, Tensor]:
    """Load a pickled state dict: tensors only (``weights_only``), memory-mapped where the file format allows it."""
    try:
        tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # files in the format before torch 1.6 cannot be mapped
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    return tensors


def local_folder(base: Path | str, revision: str | None = None) -> Path:
    """The directory of ``base``: itself, or the cached snapshot of a hub name (nothing is downloaded).

    Args:
        revision: branch, tag or commit of a hub name (default: main).

    Raises:
        ValueError: if there is neither.
    """
    if Path(base).is_dir():
        return Path(base).resolve()
    from huggingface_hub import snapshot_download

    at = f" at revision {revision!r}" if revision else ""
    try:
        return Path(snapshot_download(str(base), revision=revision, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"base model {str(base)!r}{at} is neither a directory nor a hub model in the local cache: "
            "give the checkpoint directory, or download the model first"
        ) from error


def open_base(base: Path | str, revision: str | None = None) -> BaseFiles:
    """Find the weight files, in ``from_pretrained``'s order of preference.

    Raises:
        ValueError: if there are none, or files named in the index are missing.
    """
    folder = local_folder(base, revision)
    found = next((name for name in _LAYOUTS if (folder / name).is_file()), None)
    if found is None:
        raise ValueError(f"no weights in {str(folder)!r}: expected one of {', '.join(_LAYOUTS)}")
    if found.endswith(".index.json"):
        file_of = dict(json.loads((folder / found).read_text(encoding="utf-8"))["weight_map"])
    elif found.endswith(".safetensors"):
        with safe_open(folder / found, framework="pt") as file:
            file_of = dict.fromkeys(file.keys(), found)
    else:
        file_of = dict.fromkeys(load_bin(folder / found), found)
    missing = sorted(name for name in set(file_of.values()) if not (folder / name).is_file())
    if missing:
        raise ValueError(
            f"{found} in {str(folder)!r} names files that are not there: {some(missing)}; fetch them again"
        )
    return BaseFiles(folder, file_of)


def locate_by_suffix(modules: Iterable[str], keys: Iterable[str]) -> dict[str, str]:
    """Find each module's weight among a checkpoint's tensor names, for a model that transformers cannot build.

    A checkpoint may have been saved from another class of the same model. Its names then lack a prefix of the module
    path ("encoder..." for "bert.encoder...") or have one more. Only whole path components are compared, and the match
    must be unique.

    Returns:
        module path -> tensor name; no two modules share a tensor.

    Raises:
        ValueError: some modules have no weight or several candidates; the message lists them.
    """
    keys = [key for key in keys if key.endswith(".weight")]
    known = set(keys)
    found: dict[str, str] = {}
    problems = []
    for module in modules:
        wanted = f"{module}.weight"
        hits = [wanted]
        if wanted not in known:
            hits = [key for key in keys if _is_suffix(key, wanted) or _is_suffix(wanted, key)]
        if len(hits) == 1 and hits[0] not in found.values():
            found[module] = hits[0]
        elif hits:
            problems.append(f"{module} (could be {some(hits)})")
        else:
            near = nearest(wanted, keys)
            problems.append(f"{module} (nearest: {near})" if near else module)
    if problems:
        raise ValueError(
            f"{len(problems)} adapted modules have no weight of their own in the base checkpoint: "
            f"{some(problems)}. Is this the model that was trained? "
            "A matrix tied to the embedding (lm_head) cannot be merged: export it as peft"
        )
    return found


def _is_suffix(short: str, long: str) -> bool:
    return long.endswith(f".{short}")


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def head_tensors(base: Path | str, heads: Iterable[str], revision: str | None = None) -> dict[str, Tensor]:
    """Tensors of the top-level modules named ``heads`` in the base checkpoint (empty if it has none)."""
    files = open_base(base, revision)
    pattern = re.compile(rf"(?:{'|'.join(map(re.escape, heads))})\.")
    return {key: files.read(key) for key in files.file_of if pattern.match(key)}


def copy_all_but_weights(source: Path, folder: Path) -> None:
    """Copy the files of a directory that belong to a model or its tokenizer: settings, vocabulary, templates, code."""
    for path in sorted({path for pattern in _COPIED for path in source.glob(pattern)}):
        skipped = path.name in _NOT_COPIED or path.name.startswith(".") or path.name.endswith(".index.json")
        if path.is_file() and not skipped:
            shutil.copyfile(path, folder / path.name)
    templates = source / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)
