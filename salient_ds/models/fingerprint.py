"""A cheap fingerprint of a base model's weights: from headers and samples, in well under a second for 15 GB.

Of every tensor in safetensors files, name, type, shape and three blocks of its content are hashed: the first, the
middle and the last one. Renamed folders, and the same tensors divided over other files, give the same fingerprint. A
change that spares all three blocks of every tensor is not noticed. ``.bin`` files are zip archives, whose directory
holds a checksum of every tensor; of files in torch's older format, blocks at even distances are hashed.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from salient_ds.config.run import ModelConfig

BLOCK = 4096
"""Bytes of one sample."""
_OLD_FORMAT_BLOCKS = 1024
_THREADS = 16
_LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where weights are, in the order in which transformers looks for them."""
_NOT_TRAINING = {"_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version",
                 "use_cache", "bos_token_id", "eos_token_id", "pad_token_id"}  # fmt: skip
"""Entries of config.json that do not change the training of this package."""


def base_identity(model: ModelConfig, seed: int) -> dict[str, Any]:
    """What a checkpoint records of the base model: a fingerprint of its weights, and its config.json.

    Returns an empty dict if the weights are not on this machine yet (a hub name that is still to be downloaded), or are
    in no known form.

    Raises:
        OSError: a weight file cannot be read.
    """
    folder = local_folder(model)
    if folder is None:
        return {}
    weights = f"random, train.seed={seed}" if model.random_weights else weights_fingerprint(folder)
    if weights is None:
        return {}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return {"base weights": weights, "config.json": {k: v for k, v in config.items() if k not in _NOT_TRAINING}}


def local_folder(model: ModelConfig) -> Path | None:
    """The checkpoint directory, or the cached snapshot of a hub name; None if there is neither."""
    path = Path(model.path)
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    return Path(cached).parent if isinstance(cached, str) else None


def weights_fingerprint(folder: Path) -> str | None:
    """The fingerprint of the weights in a checkpoint directory (hexadecimal); None if none are found.

    Raises:
        OSError: a file is missing, or is not what its name says.
    """
    found = next((name for name in _LAYOUTS if (folder / name).is_file()), None)
    if found is None:
        return None
    names = [found]
    if found.endswith(".index.json"):
        names = sorted(set(json.loads((folder / found).read_text(encoding="utf-8"))["weight_map"].values()))
    if not all((folder / name).is_file() for name in names):
        return None
    parts: list[bytes] = []
    for name in names:
        try:
            parts += _tensors(folder / name) if name.endswith(".safetensors") else _archive(folder / name)
        except (ValueError, KeyError, struct.error) as error:
            raise OSError(f"{folder / name} is not a file of weights ({error}): download it again") from error
    return hashlib.sha256(b"".join(sorted(parts))).hexdigest()[:32]


class _Tensor(NamedTuple):
    label: bytes
    start: int
    size: int


def _tensors(path: Path) -> list[bytes]:
    """One digest per tensor of a safetensors file."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > path.stat().st_size:
            raise ValueError(f"its header would have {length} bytes")
        table: dict[str, Any] = json.loads(file.read(length))
        entries = []
        for name, entry in table.items():
            if name != "__metadata__":
                first, last = entry["data_offsets"]
                label = json.dumps([name, entry["dtype"], entry["shape"]]).encode()
                entries.append(_Tensor(label, 8 + length + first, last - first))
        handle = file.fileno()
        with ThreadPoolExecutor(_THREADS) as pool:  # reading waits for the disk, so more threads than cores help
            slices = [entries[k::_THREADS] for k in range(_THREADS)]
            digests = pool.map(lambda part: [_sampled(handle, tensor) for tensor in part], slices)
            return [digest for part in digests for digest in part]


def _sampled(handle: int, tensor: _Tensor) -> bytes:
    digest = hashlib.sha256(tensor.label)
    for start in _starts(tensor.size, 3):
        digest.update(os.pread(handle, min(BLOCK, tensor.size - start), tensor.start + start))
    return digest.digest()


def _starts(size: int, blocks: int) -> Iterable[int]:
    """First bytes of ``blocks`` blocks from the first to the last one of ``size`` bytes; of all, if there are fewer."""
    if size <= blocks * BLOCK:
        return range(0, size, BLOCK)
    return [(size - BLOCK) * k // (blocks - 1) for k in range(blocks)]


def _archive(path: Path) -> list[bytes]:
    """The digest of a ``.bin`` file."""
    digest = hashlib.sha256(path.name.encode())
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                digest.update(f"{entry.filename.partition('/')[2]} {entry.file_size} {entry.CRC}\n".encode())
        return [digest.digest()]
    size = path.stat().st_size
    digest.update(str(size).encode())
    with path.open("rb") as file:
        for start in _starts(size, _OLD_FORMAT_BLOCKS):
            digest.update(os.pread(file.fileno(), BLOCK, start))
    return [digest.digest()]
