"""One function for all export forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from salient_ds.export.atomic import check_target
from salient_ds.export.fold import AdapterFactors
from salient_ds.export.merge import write_merged
from salient_ds.export.meta import ExportMeta, Form
from salient_ds.export.peft_format import PadTo, write_peft


def export_adapter(
    factors: Sequence[AdapterFactors],
    meta: ExportMeta,
    target: Path,
    form: Form,
    base: Path | str,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    *,
    pad_to: PadTo = None,
    trained: Mapping[str, Tensor] | None = None,
    config_updates: Mapping[str, Any] | None = None,
) -> Path:
    """Write the adapter to the directory ``target`` and return ``target``. After any error the directory is unchanged.

    Args:
        form: "peft" (every module at its own rank), "padded" (one rank for all modules) or "merged" (a full model).
            Adapters with shortcuts have their own writer (:mod:`salient_ds.heterolora.export`).
        base: checkpoint directory or hub name of the base model. Merging needs its files, local or cached.
        dtype: dtype of the tensors (default: float32 for an adapter, as in the base for a merged model).
        pad_to: see :func:`salient_ds.export.peft_format.write_peft`.
        trained: parameters that were trained in full (heads), by full name.
        config_updates: entries of the merged model's config.json that differ from the base's.

    Raises:
        ValueError: the adapter cannot be exported as asked; the message names the remedy.
        OSError: errno ENOSPC if the disk is full.
    """
    assert form != "shortcuts", "write_shortcuts knows what this one needs"
    check_target(target, overwrite)
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
    return write_peft(
        target,
        factors,
        meta,
        base,
        form=form,
        dtype=dtype or torch.float32,
        pad_to=pad_to,
        trained=trained,
        overwrite=overwrite,
    )
