"""Writes the adapter that :func:`~salient_ds.export.shrink.plan_cut` decided on, module by module.

Shape legend: I = in features, O = out features, P = rows in the file (the rank after the cut, or a padded one).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from salient_ds.export.atomic import atomic_directory, check_target
from salient_ds.export.base_files import copy_all_but_weights
from salient_ds.export.card import write_card
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.forms import FormChoice, choose_form, peft_form
from salient_ds.export.lora_config import CONFIG_FILE
from salient_ds.export.lora_folder import PREFIX, factor_key
from salient_ds.export.meta import RECORD_FILE, ExportMeta, TaskType, installed_versions, rank_entries, write_json
from salient_ds.export.peft_format import PadTo, as_stored, padded_rank, rank_fields, shadowed
from salient_ds.export.shrink import LoraSource, Shrinkage, cut_factors
from salient_ds.export.streamed import Entry, in_file_order, write_streamed

WEIGHTS = "adapter_model.safetensors"
_NULLABLE = ("task_type", "base_model_name_or_path")


@dataclass(frozen=True)
class StoredModule:
    """What the file holds of one module."""

    shape: tuple[int, int]
    """(O, I)"""
    rank: int
    rows: int
    """P: the rank, or more for the padded form."""
    dtype: torch.dtype
    embedding: bool


def write_shrunk(
    source: LoraSource,
    shrinkage: Shrinkage,
    target: Path,
    *,
    form: str = "ragged",
    dtype: torch.dtype | None = None,
    pad_to: PadTo = None,
    overwrite: bool = False,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """The second pass: write a PEFT directory, all or nothing (:func:`~salient_ds.export.peft_format.write_peft`).

    Args:
        dtype: of the factors (default: as they are stored; float64 becomes float32).
        form: "ragged" or "padded".
        pad_to: for form "padded", as in ``write_peft``.
        also: writes further files into the folder before it appears.

    Raises:
        ValueError: the target is refused (:func:`check_out`), or a value does not fit into ``dtype``.
        OSError: the disk is full; ``target`` is unchanged.
    """
    form = peft_form(form)
    if form == "ragged" and pad_to is not None:
        raise ValueError(f"--pad-to {pad_to} belongs to --form padded: leave it out, or write the padded form")
    check_out(source, target, overwrite)
    stored, rank = _stored(source, shrinkage, form, dtype, pad_to)
    entries = in_file_order([*_factor_entries(stored), *_carried(source, stored)])
    ranks = {name: module.rows for name, module in stored.items()}
    config = source.config | {"peft_type": "LORA", "inference_mode": True, **rank_fields(ranks, rank, form)}
    config["exclude_modules"] = _excluded(source.config.get("exclude_modules"), shadowed(source.modules, ranks))
    # PEFT 0.13 refuses keys that it does not know, even with null
    config = {key: value for key, value in config.items() if value is not None or key in _NULLABLE}
    record = _record(source, shrinkage, form, sorted({str(m.dtype).removeprefix("torch.") for m in stored.values()}))
    with atomic_directory(target, overwrite, sum(entry.size for entry in entries), _protected(source)) as folder:
        if source.companions is not None:
            copy_all_but_weights(source.companions, folder)
        write_streamed(folder / WEIGHTS, entries, _tensors(source, stored, entries, rank))
        write_json(folder / CONFIG_FILE, config)
        write_json(folder / RECORD_FILE, record)
        if also is not None:
            also(folder)
        _write_card(folder, source, shrinkage, form, rank)
    return target


def _write_card(folder: Path, source: LoraSource, shrinkage: Shrinkage, form: str, rank: int) -> None:
    task, base = source.config.get("task_type"), source.config.get("base_model_name_or_path")
    if task not in get_args(TaskType) or not base:
        return  # nothing says what loads it
    cut = shrinkage.cut
    facts = {"criterion": f"{cut.criterion} {cut.amount:.12g}", "energy kept": shrinkage.energy_kept}
    meta = ExportMeta(
        source.record.get("method", "lora"), cast(TaskType, task), str(source.place), base_model=base,
        revision=source.config.get("revision"), card={"Shrunk": facts},
    )  # fmt: skip
    write_card(folder, meta, form, base, shrinkage.ranks, rank)


def chosen_form(shrinkage: Shrinkage) -> FormChoice:
    """The form for an adapter after the cut, if nobody chose one."""
    return choose_form({m.name: sum(m.shape) for m in shrinkage.modules}, shrinkage.ranks)


def check_out(source: LoraSource, target: Path, overwrite: bool) -> None:
    """Raise ValueError if ``target`` must not be written: it has content, or is, contains or lies in the source."""
    check_target(target, overwrite, _protected(source))
    if source.place in target.resolve().parents:
        raise ValueError(f"output {str(target)!r} lies inside {str(source.place)!r}: choose a folder outside of it")


def _protected(source: LoraSource) -> tuple[Path | str, ...]:
    base = source.config.get("base_model_name_or_path")
    return (source.place, base) if base else (source.place,)


def _stored(
    source: LoraSource, shrinkage: Shrinkage, form: str, dtype: torch.dtype | None, pad_to: PadTo
) -> tuple[dict[str, StoredModule], int]:
    """The modules of the file, and the largest number of rows. Form "ragged" leaves out modules at rank 0."""
    largest = max(module.after for module in shrinkage.modules)
    rank = padded_rank(largest, pad_to) if form == "padded" else largest
    stored = {}
    for module in shrinkage.modules:
        if module.after or form == "padded":
            kind, rows = dtype or source.dtype(module.name), rank if form == "padded" else module.after
            embedding = module.name in source.embeddings
            stored[module.name] = StoredModule(module.shape, module.after, rows, kind, embedding)
    return stored, rank


def _factor_entries(stored: Mapping[str, StoredModule]) -> Iterator[Entry]:
    for name, module in stored.items():
        tall, wide = module.shape
        yield Entry(factor_key(name, "A", module.embedding), module.dtype, (module.rows, wide))
        yield Entry(factor_key(name, "B", module.embedding), module.dtype, (tall, module.rows))


def _carried(source: LoraSource, stored: Mapping[str, StoredModule]) -> dict[Entry, str]:
    """Entries of the tensors that are copied, with their names in the source."""
    return {Entry(_unwrapped(e.name, source, stored), e.dtype, e.shape): e.name for e in source.carried}


def _unwrapped(key: str, source: LoraSource, stored: Mapping[str, StoredModule]) -> str:
    """The name of a base layer's own tensor (its bias). PEFT's ".base_layer" is in it while the layer is adapted."""
    module, inside, leaf = key.removeprefix(PREFIX).rpartition(".base_layer.")
    gone = inside and module not in stored and module in source.modules
    return f"{PREFIX}{module}.{leaf}" if gone else key


def _tensors(
    source: LoraSource, stored: Mapping[str, StoredModule], entries: Sequence[Entry], alpha: int
) -> Iterator[Tensor]:
    """The values of all entries, for readers that multiply by ``alpha`` / rows.

    A and B of a module are neighbours, so that it is decomposed once.
    """
    owner = {factor_key(name, "A", module.embedding): name for name, module in stored.items()}
    carried = _carried(source, stored)
    for entry in entries:
        if entry.name in owner:
            name = owner[entry.name]
            yield from _rows_of(source.read(name), stored[name], alpha)
        elif entry in carried:
            yield source.read_carried(carried[entry])


def _rows_of(factors: AdapterFactors, module: StoredModule, alpha: int) -> tuple[Tensor, Tensor]:
    """A (P, I) and B (O, P) as they are stored."""
    pair, (tall, wide) = cut_factors(factors, module.rank), module.shape
    A_PI, B_OP = torch.zeros(module.rows, wide), torch.zeros(tall, module.rows)
    if pair is not None:
        A_PI[: module.rank], B_OP[:, : module.rank] = pair.A_rI, pair.B_Or * (module.rows / alpha)
    return as_stored(A_PI, module.dtype, factors.name, "A"), as_stored(B_OP, module.dtype, factors.name, "B")


def _excluded(before: Any, more: Sequence[str]) -> Any:
    """exclude_modules with more names in it: it is None, a list of names, or a pattern."""
    if isinstance(before, str) and more:
        return "|".join([f"(?:{before})", *map(re.escape, more)])
    return before if isinstance(before, str) else [*(before or []), *more] or None


def _record(source: LoraSource, shrinkage: Shrinkage, form: str, dtypes: Sequence[str]) -> dict[str, Any]:
    before, after = shrinkage.parameters
    cut = shrinkage.cut
    return {
        "format": 1,
        "form": form,
        "method": source.record.get("method", "unknown"),
        "task_type": source.config.get("task_type"),
        "base_model_name_or_path": source.config.get("base_model_name_or_path"),
        "dtype": " and ".join(dtypes),
        **rank_entries(shrinkage.ranks),
        "template": source.record.get("template"),
        "source_run": source.record.get("source_run"),
        "versions": installed_versions(),
        "shrink": {
            "source": str(source.place),
            "sha256": source.sha256(),
            "criterion": cut.criterion,
            "amount": cut.amount,
            "uniform": cut.uniform,
            "energy_kept": shrinkage.energy_kept,
            "parameters_before": before,
            "parameters_after": after,
            "total_rank_before": sum(module.before for module in shrinkage.modules),
            "total_rank_after": sum(shrinkage.ranks.values()),
            "modules": {
                m.name: {
                    "rank_before": m.before,
                    "rank_after": m.after,
                    "energy": m.spectrum.energy,
                    "energy_kept": m.kept,
                }
                for m in shrinkage.modules
            },  # fmt: skip
        },
    }
