"""Add an adapter to a base checkpoint, shard by shard.

Shape legend: I = in features, O = out features.

Without another data type, everything that is not adapted stays identical bit for bit (``merged_shards.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from salient_ds.export.atomic import atomic_directory
from salient_ds.export.base_files import BaseFiles, copy_all_but_weights, open_base
from salient_ds.export.disk_names import locate_trained, locate_weights
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.merged_shards import Changes, bytes_as, read_header, write_shard
from salient_ds.export.meta import ExportMeta, write_json, write_record
from salient_ds.export.peft_format import check_factors

_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp")
_CONV1D_LEAVES = ("c_attn", "c_proj", "c_fc", "q_attn")
_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Where config.json states the data type; the second is its name before transformers 5."""


def write_merged(
    target: Path,
    factors: Sequence[AdapterFactors],
    meta: ExportMeta,
    base: Path | str,
    *,
    dtype: torch.dtype | None = None,
    trained: Mapping[str, Tensor] | None = None,
    config_updates: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write a Hugging Face model directory to ``target``: base weights plus the adapter, all or nothing.

    Updates are added in fp64 and rounded once. What the rounding does to the update is measured, recorded and printed.
    Config, generation config, tokenizer, custom code and license files are copied.

    Args:
        dtype: of all floating-point tensors of the merged model; None: as they are stored.
        trained: parameters trained in full (a head), by full name. They replace those of the base, or are added in a
            further shard.
        config_updates: entries to change in ``config.json`` (e.g. architectures and labels of a new head).
        progress: show progress and the rounding error on stderr.

    Raises:
        ValueError: an adapted module has no weight in the base (all are listed), shapes differ, the base is quantised,
            a module is a transposed Conv1D or tied to the embedding, or the target contains the base.
        OSError: the disk is full; ``target`` is unchanged.
    """
    check_factors(factors)
    files = open_base(base, meta.revision_of(base))
    _check_mergeable(factors, files.config())
    key_of = locate_weights([item.name for item in factors], files.file_of, files.folder, meta.task_type)
    replaced, added = _in_full(trained or {}, files, meta.task_type)
    changes = Changes({key_of[item.name]: item for item in factors}, replaced, dtype)
    fill = dtype or _stored_dtype(files.config())
    added = {name: value.to(fill) if value.is_floating_point() else value for name, value in added.items()}
    if dtype is not None:
        stated = _with_dtype(files.config(), dtype) or {"dtype": _name(dtype)}
        config_updates = stated | dict(config_updates or {})
    names = _shard_names(len(files.shards) + bool(added))
    weight_map: dict[str, str] = {}
    size = bytes_as([files.folder / shard for shard in files.shards], dtype)
    with atomic_directory(target, overwrite, size, protected=(files.folder, meta.source_run)) as folder:
        copy_companions(files, folder, config_updates or {})
        for source, name in tqdm(
            list(zip(files.shards, names, strict=False)), desc="merge", unit="shard", disable=not progress
        ):
            keys = [key for key, file in files.file_of.items() if file == source]
            weight_map |= dict.fromkeys(keys, name)
            write_shard(files.folder / source, folder / name, keys, changes)
        if added:
            save_file(added, folder / names[-1], metadata={"format": "pt"})
            weight_map |= dict.fromkeys(added, names[-1])
        if len(names) > 1:
            _write_index(folder, weight_map)
        kind = "as stored" if dtype is None else _name(dtype)
        lost = {"rounding_error": changes.rounding.share}
        write_record(folder, factors, meta, "merged", meta.base_name(base), kind, lost)
    if progress:
        stored = " and ".join(sorted(map(_name, changes.stored)))
        print(changes.rounding.line(stored), file=sys.stderr, flush=True)
    return target


def _in_full(
    trained: Mapping[str, Tensor], files: BaseFiles, task_type: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters trained in full that replace tensors of the base, by their names there, and those that are added.

    Of a tied parameter, which comes under several names, only those count that the base has.
    """
    if not trained:
        return {}, {}
    key_of = locate_trained(trained, files.file_of, files.folder, task_type)
    replaced = {key_of[name]: value for name, value in trained.items() if name in key_of}
    there = {id(value) for value in replaced.values()}
    added = {name: value.detach().cpu().contiguous() for name, value in trained.items()
             if name not in key_of and id(value) not in there}  # fmt: skip
    return replaced, added


def _stored_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The data type that config.json states; float32 if it states none."""
    stated = next((config[key] for key in _DTYPE_KEYS if config.get(key) is not None), "float32")
    found = getattr(torch, str(stated), torch.float32)
    return found if isinstance(found, torch.dtype) else torch.float32


def copy_companions(files: BaseFiles, folder: Path, config_updates: Mapping[str, Any]) -> None:
    """Copy the files of the base directory that belong to the model or the tokenizer, except for weights."""
    copy_all_but_weights(files.folder, folder)
    if config_updates:
        write_json(folder / "config.json", {**files.config(), **config_updates})


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The entries of config.json that state a data type, those in its parts included, with ``dtype`` in them."""
    found: dict[str, Any] = {key: _name(dtype) for key in _DTYPE_KEYS if config.get(key) is not None}
    for key, part in config.items():
        if isinstance(part, dict) and any(name in part for name in _DTYPE_KEYS):
            found[key] = part | _with_dtype(part, dtype)
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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
    tied = [name for name in leaves if is_tied_head(name, config)]
    if tied:
        raise ValueError(
            f"{', '.join(tied)} shares its weight with the embedding (tie_word_embeddings): merging would "
            "change both or be lost on loading; export as peft, or leave it out of adapter.target_modules"
        )


def is_tied_head(name: str, config: Mapping[str, Any]) -> bool:
    """Whether the module shares its weight with the embedding, given the content of config.json."""
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
