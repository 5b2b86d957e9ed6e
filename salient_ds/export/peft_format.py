"""Write a LoRA directory in PEFT's format, without PEFT.

Shape legend: I = in features, O = out features, r = live rank of a module, P = padded rank of all modules.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from salient_ds.export.atomic import atomic_directory
from salient_ds.export.base_files import head_tensors
from salient_ds.export.card import write_card
from salient_ds.export.fold import AdapterFactors, LoraPair, fold
from salient_ds.export.forms import VLLM_RANKS, PeftForm, with_alpha
from salient_ds.export.meta import ExportMeta, write_json, write_record
from salient_ds.export.peft_loading import peft_warning

HEADS: dict[str, tuple[str, ...]] = {"SEQ_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""Modules that PEFT always restores whole for a task type. An adapter file without them does not load."""
_OTHER_HEADS = ("classification_head",)
"""Heads that PEFT does not know (BART, T5). It restores them like any module that is stored in full."""
PadTo = int | Literal["vllm"] | None


def write_peft(
    target: Path,
    factors: Sequence[AdapterFactors],
    meta: ExportMeta,
    base: Path | str,
    *,
    form: PeftForm,
    dtype: torch.dtype = torch.float32,
    pad_to: PadTo = None,
    trained: Mapping[str, Tensor] | None = None,
    overwrite: bool = False,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write ``adapter_model.safetensors``, ``adapter_config.json``, ``salient_ds.json`` and a card, all or nothing.

    Prints a warning if PEFT itself would not load all of it.

    Form "ragged": every module has its own rank, and those at rank 0 are left out. ``lora_alpha`` is the largest rank,
    for all of them; the rest of each scale is in B (:func:`~salient_ds.export.forms.with_alpha`).

    Form "padded": every module, even one at rank 0, is padded with rows of zeros to the same rank, which ``lora_alpha``
    equals. This is for servers that need one rank, or that stack q, k and v of a layer and fail if one is missing.

    Args:
        dtype: dtype of the stored factors.
        pad_to: for "padded" only: a rank, "vllm" for the next value of VLLM_RANKS, or None for the largest live rank.
        trained: parameters trained in full (a classification head), by full name. Stored in ``dtype``, too.
        also: writes further files (a tokenizer, pictures) into the folder before it appears.

    Raises:
        ValueError: as :func:`check_factors`; a head that PEFT needs is neither in ``trained`` nor in ``base``; an
            adapted module lies inside a module stored in full; or a value does not fit into ``dtype``.
        OSError: the disk is full; ``target`` is unchanged.
    """
    check_factors(factors)
    if form == "ragged" and pad_to is not None:
        raise ValueError(f"pad_to={pad_to!r} belongs to the padded form: leave it out, or export as padded")
    heads, saved_modules = _heads(meta, base, trained or {})
    _check_no_head_adapted(factors, saved_modules)
    largest = max(item.rank for item in factors)
    rank = padded_rank(largest, pad_to) if form == "padded" else largest
    pairs = _padded_pairs(factors, rank) if form == "padded" else _ragged_pairs(factors, rank)
    tensors = {f"base_model.model.{name}": _stored(name, value, dtype) for name, value in heads.items()}
    for pair in pairs:
        tensors |= _named(pair, dtype)
    base_name = meta.base_name(base)
    ranks = {pair.name: pair.rank for pair in pairs}
    config = _config(ranks, rank, form, meta, base_name, saved_modules)
    if hidden := shadowed([item.name for item in factors], ranks):
        config["exclude_modules"] = hidden
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    with atomic_directory(target, overwrite, size, protected=(base, meta.source_run)) as folder:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(folder / "adapter_config.json", config)
        write_record(folder, factors, meta, form, base_name, str(dtype).removeprefix("torch."))
        if also is not None:
            also(folder)
        write_card(folder, meta, form, base_name, {item.name: item.rank for item in factors}, rank)
    warning = peft_warning([pair.name for pair in pairs], base, meta.task_type)
    if warning is not None:
        print(warning, file=sys.stderr, flush=True)
    return target


def check_factors(factors: Sequence[AdapterFactors]) -> None:
    """Raise ValueError if there is nothing to export, or a module is given twice."""
    names = [item.name for item in factors]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise ValueError(f"modules given twice: {', '.join(twice)}")
    if not any(item.rank for item in factors):
        raise ValueError(
            f"all {len(factors)} adapted modules have rank 0: the adapter would do nothing, and loaders refuse "
            "rank 0; export a checkpoint from before the pruning, or raise the target budget"
        )


def padded_rank(largest: int, pad_to: PadTo) -> int:
    """The one rank that all modules are padded to. ``largest`` is the largest live rank.

    Raises:
        ValueError: ``pad_to`` is too small, or vLLM accepts no rank that is large enough.
    """
    if pad_to is None:
        return largest
    if pad_to == "vllm":
        fitting = [value for value in VLLM_RANKS if value >= largest]
        if not fitting:
            raise ValueError(f"largest rank {largest} exceeds vLLM's maximum of {VLLM_RANKS[-1]}: export as merged")
        return fitting[0]
    if pad_to < largest:
        raise ValueError(f"pad_to={pad_to} is below the largest rank {largest}: raise it, or leave it out")
    return pad_to


def _ragged_pairs(factors: Sequence[AdapterFactors], alpha: int) -> list[LoraPair]:
    return [with_alpha(pair, alpha) for pair in map(fold, factors) if pair is not None]


def _padded_pairs(factors: Sequence[AdapterFactors], rank: int) -> list[LoraPair]:
    pairs = []
    for item in factors:
        A_PI, B_OP = torch.zeros(rank, item.A.shape[1]), torch.zeros(item.B.shape[0], rank)
        pair = fold(item)
        if pair is not None:
            A_PI[: pair.rank] = pair.A_rI
            B_OP[:, : pair.rank] = pair.B_Or
        pairs.append(LoraPair(item.name, A_PI, B_OP))
    return pairs


def _named(pair: LoraPair, dtype: torch.dtype) -> dict[str, Tensor]:
    out = {}
    for letter, value in (("A", pair.A_rI), ("B", pair.B_Or)):
        out[f"base_model.model.{pair.name}.lora_{letter}.weight"] = as_stored(value, dtype, pair.name, letter)
    return out


def as_stored(factor: Tensor, dtype: torch.dtype, module: str, letter: str) -> Tensor:
    """A factor ("A" or "B") in the type that it is stored in.

    Raises:
        ValueError: a value does not fit into the type.
    """
    cast = factor.to(dtype).contiguous()
    if not cast.isfinite().all():
        raise ValueError(
            f"lora_{letter} of {module!r} reaches {factor.abs().max():.3g}, too large for {dtype}: "
            "export as float32 or bfloat16"
        )
    return cast


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy of its own: safetensors refuses tied parameters, which share memory."""
    cast = value.detach().cpu().to(dtype) if value.is_floating_point() else value.detach().cpu()
    if not cast.isfinite().all():
        raise ValueError(f"{name!r} reaches {value.abs().max():.3g}, too large for {dtype}: export as float32")
    return cast.clone().contiguous()


def _config(
    ranks: Mapping[str, int],
    rank: int,
    form: str,
    meta: ExportMeta,
    base_name: str,
    saved_modules: list[str],
) -> dict[str, Any]:
    revision = meta.revision_of(base_name)
    return {
        "peft_type": "LORA",
        "task_type": meta.task_type,
        "base_model_name_or_path": base_name,
        **({"revision": revision} if revision else {}),
        "inference_mode": True,
        **rank_fields(ranks, rank, form),
        **({"modules_to_save": saved_modules} if saved_modules else {}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
    }


def rank_fields(ranks: Mapping[str, int], rank: int, form: str) -> dict[str, Any]:
    """The fields of adapter_config.json that state modules, their ranks and scales.

    Args:
        ranks: module -> rank, for the modules that are in the file.
        rank: the largest of them, or that which all are padded to; also ``lora_alpha``.
    """
    # PEFT takes the first pattern that matches the end of a module path. Deeper paths come first, so that
    # "model.layers.0.q" does not match in place of "vision.model.layers.0.q".
    deepest_first = sorted(ranks, key=lambda name: -name.count("."))
    pattern = {_key_of(name, ranks): ranks[name] for name in deepest_first} if form == "ragged" else {}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "target_modules": list(ranks),
        "init_lora_weights": True,
        "use_rslora": False,
    }


def _key_of(name: str, names: Collection[str]) -> str:
    """The key of a module in rank_pattern, where PEFT wants a regular expression.

    PEFT before 0.14 finds a whole path only if it is written as it is. So dots are escaped only where they would match
    something else in another path.
    """
    pattern = re.compile(rf"(?:.*\.)?{name}")
    plain = re.fullmatch(r"[\w.]+", name) is not None
    mistaken = plain and any(pattern.fullmatch(other) and not f".{other}".endswith(f".{name}") for other in names)
    return name if plain and not mistaken else re.escape(name)


def shadowed(modules: Sequence[str], kept: Collection[str]) -> list[str]:
    """Left-out modules that PEFT would adapt nevertheless, because their path ends with that of an adapted module."""
    return [n for n in modules if n not in kept and any(n.endswith(f".{name}") for name in kept)]


def _heads(meta: ExportMeta, base: Path | str, trained: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors stored in full beside the factors, and the names of the modules that PEFT must restore from them."""
    heads, wanted = dict(trained), HEADS.get(meta.task_type, ())
    if wanted and not any(_owner(name, wanted) in wanted for name in heads):
        heads |= head_tensors(base, wanted, meta.revision_of(base))
        if not any(_owner(name, (*wanted, *_OTHER_HEADS)) in (*wanted, *_OTHER_HEADS) for name in heads):
            raise ValueError(
                f"task_type {meta.task_type} needs the head ({' or '.join(wanted)}) in the adapter, and the base "
                f"checkpoint {str(base)!r} has none: pass the head of the trained model"
            )
    return heads, sorted({_owner(name, wanted) for name in heads})


def _owner(parameter: str, heads: Sequence[str]) -> str:
    """The module that PEFT must restore whole for this parameter: its head if it is in one, else its own module."""
    first = parameter.partition(".")[0]
    return first if first in heads else parameter.rpartition(".")[0]


def _check_no_head_adapted(factors: Sequence[AdapterFactors], saved_modules: Sequence[str]) -> None:
    inside = [f.name for f in factors if any(re.search(rf"(^|\.){re.escape(m)}($|\.)", f.name) for m in saved_modules)]
    if inside:
        raise ValueError(
            f"adapted modules {', '.join(inside)} lie inside {', '.join(saved_modules)}, which PEFT restores whole "
            "and does not adapt: export as merged, or leave them out of adapter.target_modules"
        )
