"""Add an adapter to a base checkpoint, shard by shard.

Shape legend: I = in features, O = out features.

Each output shard is a byte copy of the base shard. Only the tensors that change are overwritten, in place. A tensor
keeps its dtype and shape, so the header and the offsets of the safetensors file stay valid. Everything else is
identical bit for bit. Only one matrix at a time is in memory. Pickled ``.bin`` shards are first converted to
safetensors, one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from salient_ds.export.atomic import atomic_directory
from salient_ds.export.base_files import BaseFiles, load_bin, locate_weights, open_base
from salient_ds.export.fold import AdapterFactors, delta_weight, fold
from salient_ds.export.meta import ExportMeta, write_json, write_record
from salient_ds.export.peft_format import check_factors

_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py", "LICENSE*", "NOTICE*")
_NOT_COPIED = ("trainer_state.json", "adapter_config.json", "salient_ds.json")
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_LEAVES = ("c_attn", "c_proj", "c_fc", "q_attn")


def write_merged(
    target: Path,
    factors: Sequence[AdapterFactors],
    meta: ExportMeta,
    base: Path | str,
    *,
    trained: Mapping[str, Tensor] | None = None,
    config_updates: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a Hugging Face model directory to ``target``: base weights plus the adapter, all or nothing.

    Updates are added in fp32 (fp64 if the weight is stored so) and cast back to the stored dtype. Config, generation
    config, tokenizer, custom code and license files are copied.

    Args:
        trained: parameters trained in full (a head), by full name. They replace those of the base, or are added in a
            further shard.
        config_updates: entries to change in ``config.json`` (e.g. architectures and labels of a new head).

    Raises:
        ValueError: an adapted module has no weight in the base (all are listed), shapes differ, the base is quantised,
            a module is a transposed Conv1D or tied to the embedding, or the target contains the base.
        OSError: the disk is full; ``target`` is unchanged.
    """
    check_factors(factors)
    files = open_base(base)
    trained = trained or {}
    _check_mergeable(factors, files.config())
    key_of = locate_weights([item.name for item in factors], files.file_of)
    adapters = {key_of[item.name]: item for item in factors}
    added = {name: value.detach().cpu().contiguous() for name, value in trained.items() if name not in files.file_of}
    names = _shard_names(len(files.shards) + bool(added))
    weight_map: dict[str, str] = {}
    with atomic_directory(target, overwrite, files.total_bytes, protected=(files.folder, meta.source_run)) as folder:
        copy_companions(files, folder, config_updates or {})
        for source, name in tqdm(
            list(zip(files.shards, names, strict=False)), desc="merge", unit="shard", disable=not progress
        ):
            copy_shard(files.folder / source, folder / name)
            keys = [key for key, file in files.file_of.items() if file == source]
            weight_map |= dict.fromkeys(keys, name)
            with (folder / name).open("r+b") as shard:
                _patch(shard, keys, adapters, trained)
        if added:
            save_file(added, folder / names[-1], metadata={"format": "pt"})
            weight_map |= dict.fromkeys(added, names[-1])
        if len(names) > 1:
            _write_index(folder, weight_map)
        write_record(folder, factors, meta, "merged", meta.base_name(base), "as stored")
    return target


def _patch(
    shard: BinaryIO,
    keys: Sequence[str],
    adapters: Mapping[str, AdapterFactors],
    trained: Mapping[str, Tensor],
) -> None:
    """Overwrite the adapted and trained tensors of one safetensors file in place."""
    header, start = _checked_header(shard, keys)
    for key in keys:
        if key in trained:
            new = trained[key].detach().cpu()
        elif key in adapters and adapters[key].rank:
            new = _merged_weight(shard, start, header[key], adapters[key], key)
        else:
            continue
        stored = _stored_dtype(header[key], key)
        if list(new.shape) != header[key]["shape"]:
            shape = header[key]["shape"]
            raise ValueError(f"{key!r} is {shape} in the base, {list(new.shape)} in the run: wrong base model?")
        cast = new.to(stored).contiguous()
        if not cast.isfinite().all():
            raise ValueError(f"{key!r} overflows {stored} after merging: convert the base to bfloat16 or float32 first")
        shard.seek(start + header[key]["data_offsets"][0])
        shard.write(cast.reshape(-1).view(torch.uint8).numpy().data)


def _merged_weight(shard: BinaryIO, start: int, entry: dict[str, Any], adapter: AdapterFactors, key: str) -> Tensor:
    """W0 + B A, (O, I), in fp32 (fp64 if the base weight is stored so)."""
    expected = [adapter.B.shape[0], adapter.A.shape[1]]
    if entry["shape"] != expected:
        hint = "is this the model that was trained?"
        if entry["shape"] == expected[::-1]:
            hint = "it is stored transposed (Conv1D), which is not supported; adapt nn.Linear layers only"
        raise ValueError(f"adapter {adapter.name!r} is {expected}, its base weight {key!r} {entry['shape']}: {hint}")
    stored = _stored_dtype(entry, key)
    begin, end = entry["data_offsets"]
    shard.seek(start + begin)
    base_OI = torch.frombuffer(bytearray(shard.read(end - begin)), dtype=stored).reshape(entry["shape"])
    pair = fold(adapter)
    assert pair is not None, "rank 0 was filtered out"
    wide_OI = base_OI if stored == torch.float64 else base_OI.float()
    return wide_OI + delta_weight(pair)


def read_header(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file (name -> dtype, shape, data_offsets), and the position where its data starts.

    Raises:
        ValueError: the file ends inside its header.
    """
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    content = file.read(length)
    if len(content) < length or not length:
        raise ValueError("a base shard is truncated inside its header: fetch it again")
    return dict(json.loads(content)), 8 + length


def _checked_header(shard: BinaryIO, keys: Sequence[str]) -> tuple[dict[str, Any], int]:
    header, start = read_header(shard)
    lost = [key for key in keys if key not in header]
    if lost:
        raise ValueError(f"the index of the base checkpoint names tensors that their file lacks, e.g. {lost[0]!r}")
    expected = start + max((header[key]["data_offsets"][1] for key in keys), default=0)
    size = shard.seek(0, 2)
    if size < expected:
        raise ValueError(f"the base shard with {keys[0]!r} is truncated, {size} bytes of {expected}: fetch it again")
    return header, start


def _stored_dtype(entry: dict[str, Any], key: str) -> torch.dtype:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(
            f"base weight {key!r} is stored as {entry['dtype']}: merging needs one of {', '.join(_DTYPES)}, "
            "not a quantised base; export as peft instead"
        )
    return _DTYPES[entry["dtype"]]


def copy_shard(source: Path, destination: Path) -> None:
    """Copy a safetensors file as it is, or convert a pickled one. Tied tensors are written once per name."""
    if source.suffix == ".safetensors":
        shutil.copyfile(source, destination)
        return
    tensors = {key: value.clone(memory_format=torch.contiguous_format) for key, value in load_bin(source).items()}
    save_file(tensors, destination, metadata={"format": "pt"})


def copy_companions(files: BaseFiles, folder: Path, config_updates: Mapping[str, Any]) -> None:
    """Copy the files of the base directory that belong to the model or the tokenizer, except for weights."""
    for source in sorted({path for pattern in _COPIED for path in files.folder.glob(pattern)}):
        skipped = source.name in _NOT_COPIED or source.name.startswith(".") or source.name.endswith(".index.json")
        if source.is_file() and not skipped:
            shutil.copyfile(source, folder / source.name)
    templates = files.folder / "additional_chat_templates"
    if templates.is_dir():
        shutil.copytree(templates, folder / templates.name)
    if config_updates:
        write_json(folder / "config.json", {**files.config(), **config_updates})


def _shard_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]


def _write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    total = 0
    for name in dict.fromkeys(weight_map.values()):
        with (folder / name).open("rb") as file:
            total += (folder / name).stat().st_size - read_header(file)[1]
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def _check_mergeable(factors: Sequence[AdapterFactors], config: Mapping[str, Any]) -> None:
    leaves = {item.name: item.name.rpartition(".")[2] for item in factors}
    transposed = [name for name, leaf in leaves.items() if leaf in _CONV1D_LEAVES]
    if transposed and config.get("model_type") in _CONV1D_MODELS:
        raise ValueError(
            f"{config['model_type']} stores {', '.join(transposed[:3])} transposed (Conv1D): not supported, "
            "adapt nn.Linear layers only"
        )
    tied = [name for name in leaves if _is_tied_head(name, config)]
    if tied:
        raise ValueError(
            f"{', '.join(tied)} shares its weight with the embedding (tie_word_embeddings): merging would "
            "change both or be lost on loading; export as peft, or leave it out of adapter.target_modules"
        )


def _is_tied_head(name: str, config: Mapping[str, Any]) -> bool:
    head = name in ("lm_head", "embed_out", "cls.predictions.decoder")
    if not head or "model_type" not in config:
        return False
    if "tie_word_embeddings" in config:
        return bool(config["tie_word_embeddings"])
    from transformers import AutoConfig

    try:
        default = AutoConfig.for_model(config["model_type"])
    except ValueError:  # custom code: its default is unknown here
        return True
    return bool(getattr(default, "tie_word_embeddings", True))
