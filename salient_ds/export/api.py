"""One function for all export forms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.export.atomic import check_target
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.forms import PeftForm, choose_form, peft_form
from salient_ds.export.gguf_format import write_gguf
from salient_ds.export.merge import write_merged
from salient_ds.export.meta import ExportMeta, Form
from salient_ds.export.peft_format import PadTo, check_factors, write_peft


def export_adapter(
    factors: Sequence[AdapterFactors],
    meta: ExportMeta,
    target: Path,
    form: Form | None,
    base: Path | str,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    *,
    pad_to: PadTo = None,
    trained: Mapping[str, Tensor] | None = None,
    config_updates: Mapping[str, Any] | None = None,
    also: Callable[[Path], None] | None = None,
) -> Path:
    """Write the adapter to the directory ``target`` and return ``target``. After any error the directory is unchanged.

    Args:
        form: "ragged" (every module at its own rank; "peft" is its older name), "padded" (one rank for all modules),
            "gguf" (one file for llama.cpp) or "merged" (a full model). None chooses between the first two by size
            (:func:`salient_ds.export.forms.choose_form`), and prints what the user should know about it. Adapters with
            shortcuts have their own writer (:mod:`salient_ds.heterolora.export`).
        base: checkpoint directory or hub name of the base model. Merging needs its files, local or cached.
        dtype: dtype of the tensors (default: float32 for an adapter, as in the base for a merged model).
        pad_to: see :func:`salient_ds.export.peft_format.write_peft`.
        trained: parameters that were trained in full (heads), by full name.
        config_updates: entries of the merged model's config.json that differ from the base's.
        also: writes further files into the folder of a ragged or padded adapter before it appears.

    Raises:
        ValueError: the adapter cannot be exported as asked; the message names the remedy.
        OSError: errno ENOSPC if the disk is full.
    """
    assert form != "shortcuts", "write_shortcuts knows what this one needs"
    check_target(target, overwrite)
    if form is None:
        form = "padded" if pad_to is not None else form_by_size(factors)
    if form == "merged":
        if pad_to is not None:
            raise ValueError(f"pad_to={pad_to} belongs to the padded form: a merged model has no ranks, leave it out")
        return write_merged(
            target,
            factors,
            meta,
            base,
            dtype=dtype,
            trained=trained,
            config_updates=config_updates,
            overwrite=overwrite,
        )
    if config_updates:
        raise ValueError(f"config_updates={dict(config_updates)} applies to the merged form only")
    if pad_to is not None and form != "padded":
        raise ValueError(f"pad_to={pad_to!r} belongs to the padded form: leave it out, or export as padded")
    if form == "gguf":
        return write_gguf(
            target, factors, meta, base, dtype=dtype or torch.float32, trained=trained, overwrite=overwrite
        )
    return write_peft(
        target,
        factors,
        meta,
        base,
        form=peft_form(form),
        dtype=dtype or torch.float32,
        pad_to=pad_to,
        trained=trained,
        overwrite=overwrite,
        also=also,
    )


def form_by_size(factors: Sequence[AdapterFactors]) -> PeftForm:
    """The form for an adapter that nobody chose one for. Prints what the user should know about it."""
    check_factors(factors)
    widths = {item.name: item.A.shape[1] + item.B.shape[0] for item in factors}
    choice = choose_form(widths, {item.name: item.rank for item in factors})
    if choice.note is not None:
        print(choice.note, file=sys.stderr, flush=True)
    return choice.form
