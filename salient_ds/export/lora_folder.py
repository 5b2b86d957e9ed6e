"""A PEFT LoRA adapter on disk, whoever trained it, read one module at a time.

Only the names and shapes of tensors are read when a directory is opened. Everything that is wrong with them is found
then, before anything is computed.

Shape legend: I = in features, O = out features, r = rank of a module.
"""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from salient_ds.export.base_files import load_bin, some
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.lora_config import CONFIG_FILE, read_lora_config
from salient_ds.export.meta import RECORD_FILE
from salient_ds.export.streamed import DTYPES, Entry
from salient_ds.host import file_sha256

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
_FACTOR = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<table>[AB]))"
)
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def factor_key(module: str, letter: str, embedding: bool) -> str:
    """The name of a factor in PEFT's files. The update of an embedding is scale * (B A)^T."""
    return f"{PREFIX}{module}.lora_embedding_{letter}" if embedding else f"{PREFIX}{module}.lora_{letter}.weight"


class WeightFile:
    """The tensors of one file. Shapes are known at once; values are read when they are asked for.

    A ``.bin`` file is loaded with ``weights_only``, so that it cannot run code. It is mapped into memory, if it was
    written by torch 1.6 or later.

    Raises:
        ValueError: the file is missing, damaged, or holds other things than tensors.
    """

    def __init__(self, folder: Path) -> None:
        found = [folder / name for name in WEIGHT_FILES if (folder / name).is_file()]
        if not found:
            raise ValueError(_why_no_weights(folder))
        self.path = found[0]
        try:
            self._open()
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
            reason = str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__
            raise ValueError(
                f"{self.path} is damaged or holds other things than tensors ({reason}): save or fetch it again"
            ) from error

    def _open(self) -> None:
        self._loaded: dict[str, Tensor] = {}
        self.entries: dict[str, Entry] = {}
        if self.path.suffix == ".safetensors":
            self._file: Any = safe_open(self.path, framework="pt")
            for key in self._file.keys():  # noqa: SIM118 (not a dict)
                part = self._file.get_slice(key)
                if part.get_dtype() not in DTYPES:
                    raise RuntimeError(f"{key} is stored as {part.get_dtype()}")
                self.entries[key] = Entry(key, DTYPES[part.get_dtype()], tuple(part.get_shape()))
            return
        content: Any = load_bin(self.path)
        if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
            raise RuntimeError("it is no dictionary of tensors")
        if not {value.dtype for value in content.values()} <= set(DTYPES.values()):
            raise RuntimeError("a tensor has a type that safetensors does not know")
        self._loaded = content
        self.entries = {key: Entry(key, value.dtype, tuple(value.shape)) for key, value in content.items()}

    def read(self, key: str) -> Tensor:
        """One tensor, on the CPU, in the stored dtype."""
        if self._loaded:
            return self._loaded[key]
        tensor: Tensor = self._file.get_tensor(key)
        return tensor


def _why_no_weights(folder: Path) -> str:
    parts = sorted(path.name for path in folder.glob("adapter_model*"))
    what = f"holds {some(parts)}, which PEFT does not read either" if parts else "holds no weights"
    return f"{folder} {what}: expected {' or '.join(WEIGHT_FILES)}"


@dataclass(frozen=True)
class FactorPair:
    """Where the two factors of a module are, and how large they are."""

    A: Entry
    """(r, I)"""
    B: Entry
    """(O, r)"""
    embedding: bool
    """For an embedding, I is the number of tokens and O is the width."""

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds both factors. Products are written in float32 at most."""
        return min(torch.promote_types(self.A.dtype, self.B.dtype), torch.float32, key=lambda dtype: dtype.itemsize)


class LoraFolder:
    """An adapter directory that was checked but not read.

    Raises:
        ValueError: it is not a plain LoRA adapter, files are missing or damaged, or tensors do not belong together.
    """

    def __init__(self, folder: Path) -> None:
        self.place = folder.resolve()
        self.lora = read_lora_config(folder)
        self.weights = WeightFile(folder)
        self.pairs = self._paired()
        self._check_ranks()
        self.modules = sorted(self.pairs, key=_natural)
        """Paths of the adapted modules in the base model. Layer 2 comes before layer 10."""
        self.embeddings = {name for name, pair in self.pairs.items() if pair.embedding}
        self.companions: Path | None = self.place
        factors = {entry.name for pair in self.pairs.values() for entry in (pair.A, pair.B)}
        self.carried: list[Entry] = [entry for key, entry in self.weights.entries.items() if key not in factors]
        """All other tensors: modules trained in full, biases, tokens."""
        self.config: dict[str, Any] = self.lora.carried
        self.record: dict[str, Any] = _read_record(folder)

    def dtype(self, module: str) -> torch.dtype:
        """The type in which factors of this module are written by default."""
        return self.pairs[module].dtype

    def read(self, module: str) -> AdapterFactors:
        """The factors of one module, in the stored dtype, with their scale.

        In an adapter that we padded, the rows of zeros at the end of both factors do not count.
        """
        pair = self.pairs[module]
        A_rI, B_Or = self.weights.read(pair.A.name), self.weights.read(pair.B.name)
        mask_r = torch.ones(pair.rank, dtype=torch.bool)
        if self.record.get("form") == "padded":
            filled_r = (A_rI != 0).any(1) | (B_Or != 0).any(0)
            mask_r = filled_r.flip(0).cummax(0).values.flip(0)  # True up to the last row that holds something
        return AdapterFactors(module, A_rI, None, B_Or, mask_r, self.lora.scaling(module))

    def read_carried(self, key: str) -> Tensor:
        """One of the other tensors."""
        return self.weights.read(key)

    def sha256(self) -> dict[str, str]:
        """File name -> sha256 of its content."""
        return {path.name: file_sha256(path) for path in (self.weights.path, self.lora.path)}

    def notes(self) -> list[str]:
        """What a user should know about the directory."""
        unknown = self.lora.unknown
        return [f"{CONFIG_FILE} sets {some(unknown)}, unknown to this version: carried over unread"] if unknown else []

    def _paired(self) -> dict[str, FactorPair]:
        halves: dict[tuple[str, bool], dict[str, Entry]] = {}
        strange = []
        for key, entry in self.weights.entries.items():
            match = _FACTOR.fullmatch(key)
            if match is not None:
                embedding = match["table"] is not None
                halves.setdefault((match["module"], embedding), {})[match["table"] or match["linear"]] = entry
            elif "lora_" in key:
                strange.append(key)
        path = self.weights.path
        if strange:
            raise ValueError(
                f"{path} holds {some(strange)}: these are not names that PEFT saves for plain LoRA "
                f"({PREFIX}MODULE.lora_A.weight); save it with PEFT's save_pretrained"
            )
        if not halves:
            raise ValueError(f"{path} holds no tensor named {PREFIX}MODULE.lora_A.weight: this is not a LoRA adapter")
        lone = [f"{name} (only lora_{'AB'['B' in found]})" for (name, _), found in halves.items() if len(found) == 1]
        if lone:
            raise ValueError(f"{path} lacks one factor of {some(lone)}: it is incomplete, save or fetch it again")
        pairs = {name: FactorPair(found["A"], found["B"], embedding) for (name, embedding), found in halves.items()}
        if len(pairs) < len(halves) or (self.lora.values.get("ensure_weight_tying") and any(e for _, e in halves)):
            raise ValueError(f"{path} ties factors of an embedding to those of another module: this is not supported")
        for name, pair in pairs.items():
            self._check_shapes(name, pair)
        return pairs

    def _check_shapes(self, name: str, pair: FactorPair) -> None:
        where, A, B = f"{self.weights.path}: {name}", pair.A, pair.B
        if 0 in (*A.shape, *B.shape):
            raise ValueError(f"{where} has empty factors: it was saved under ZeRO-3 or FSDP without gathering them")
        if A.dtype not in _FLOATS or B.dtype not in _FLOATS:
            raise ValueError(f"{where} is stored as {A.dtype} and {B.dtype}: convert it to float32 or bfloat16 first")
        if len(A.shape) > 2 or len(B.shape) > 2:
            raise ValueError(f"{where} is a convolution, lora_A {A.shape}: only linear layers and embeddings are read")
        if len(A.shape) != 2 or len(B.shape) != 2 or A.shape[0] != B.shape[1]:
            raise ValueError(f"{where} has lora_A {A.shape} and lora_B {B.shape}: expected (r, I) and (O, r)")

    def _check_ranks(self) -> None:
        wrong = [
            f"{name} (has {pair.rank}, stated {self.lora.rank_of(name)})"
            for name, pair in self.pairs.items()
            if pair.rank != self.lora.rank_of(name)
        ]
        if wrong:
            raise ValueError(
                f"{self.weights.path} and {CONFIG_FILE} state different ranks, so the scale is unknown: {some(wrong)}; "
                "are the files from the same adapter?"
            )


def _natural(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in path.split(".")]


def _read_record(folder: Path) -> dict[str, Any]:
    """``salient_ds.json`` of an exported adapter; empty for any other."""
    path = folder / RECORD_FILE
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): export the adapter again, or remove the file") from error
